// An NVIDIA driver of CUDA 12.4, for whom this is loaded in its place: it does no more than say so.
extern "C" {

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int* version) {
  *version = 12040;
  return 0;
}

}  // extern "C"
