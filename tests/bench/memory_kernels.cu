// A thread block takes the next kMemoryKernelStep bytes, by 16-byte accesses that won't be used
// again; there are many more blocks than the SMs hold, so all SMs have loads in flight throughout.
#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "tests/bench/memory_kernels.h"

namespace foretoken::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;  // loads of a thread
static_assert(kThreads * kInFlight * sizeof(uint4) == kMemoryKernelStep);

__device__ std::size_t first_word() {
  return static_cast<std::size_t>(blockIdx.x) * kThreads * kInFlight + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads) copy_kernel(uint4* to, const uint4* from) {
  uint4 words[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) words[i] = __ldcs(from + first_word() + i * kThreads);
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) __stcs(to + first_word() + i * kThreads, words[i]);
}

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* from, unsigned* sink) {
  uint4 words[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) words[i] = __ldcs(from + first_word() + i * kThreads);
  unsigned all = 0;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) all ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
  if (all == ~0U) *sink = all;
}

unsigned num_blocks(std::size_t bytes) {
  FT_CHECK(bytes % kMemoryKernelStep == 0, bytes);
  return static_cast<unsigned>(bytes / kMemoryKernelStep);
}

cudaStream_t handle_of(Stream& stream) { return static_cast<cudaStream_t>(stream.native_handle()); }

}  // namespace

void copy_memory(void* to, const void* from, std::size_t bytes, Stream& stream) {
  copy_kernel<<<num_blocks(bytes), kThreads, 0, handle_of(stream)>>>(
      static_cast<uint4*>(to), static_cast<const uint4*>(from));
  FT_CUDA(cudaGetLastError());
}

void read_memory(const void* from, std::size_t bytes, unsigned* sink, Stream& stream) {
  read_kernel<<<num_blocks(bytes), kThreads, 0, handle_of(stream)>>>(
      static_cast<const uint4*>(from), sink);
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels
