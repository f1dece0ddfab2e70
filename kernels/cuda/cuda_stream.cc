#include "kernels/cuda/cuda_stream.h"

#include <cuda_runtime.h>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"

namespace foretoken::kernels::cuda {

CudaStream::CudaStream(StreamKind kind) : kind_(kind) {
  int lowest = 0;
  int highest = 0;
  FT_CUDA(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  // Gathers go first where both wait for an SM: they are few, and a layer will wait for them.
  FT_CUDA(cudaStreamCreateWithPriority(&handle_, cudaStreamNonBlocking,
                                       kind == StreamKind::kCopy ? highest : lowest));
  FT_CUDA(cudaMalloc(&counters_, kNumCounters * sizeof *counters_));
  FT_CUDA(cudaMemset(counters_, 0, kNumCounters * sizeof *counters_));
}

CudaStream::~CudaStream() {
  cudaStreamSynchronize(handle_);
  cudaFree(scratch_);
  cudaFree(counters_);
  cudaStreamDestroy(handle_);
}

void CudaStream::synchronize() { FT_CUDA(cudaStreamSynchronize(handle_)); }

std::byte* CudaStream::scratch(std::size_t bytes) {
  if (bytes <= scratch_bytes_) return scratch_;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  FT_CUDA(cudaStreamIsCapturing(handle_, &status));
  FT_CHECK(status == cudaStreamCaptureStatusNone, bytes, scratch_bytes_);
  synchronize();
  FT_CUDA(cudaFree(scratch_));
  scratch_ = nullptr;
  scratch_bytes_ = 0;
  FT_CUDA(cudaMalloc(&scratch_, bytes));
  scratch_bytes_ = bytes;
  return scratch_;
}

}  // namespace foretoken::kernels::cuda
