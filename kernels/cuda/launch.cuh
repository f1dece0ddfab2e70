// Launching kernels that overlap: a kernel's blocks may start while the kernel before it on the
// stream still runs (programmatic dependent launch), and wait for its results where they need
// them. What no earlier kernel of the step writes, the weights above all, may be read before.
#pragma once

#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_stream.h"

namespace foretoken::kernels::cuda {

// Multiprocessors of the device: what a persistent grid is a multiple of.
inline int num_sms() {
  int device = 0;
  int count = 0;
  FT_CUDA(cudaGetDevice(&device));
  FT_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Lets the next kernel's blocks start as soon as there is room beside this kernel's.
__device__ inline void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Returns when everything before this kernel is done and visible. Every kernel that is launched by
// launch_overlapped() calls it before it touches what an earlier op writes or reads; but for what
// serialize_next() keeps apart from it, and what was done before a kernel in between that waits
// first and only then allows the next one.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

template <typename... Params, typename... Args>
void launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                       CudaStream& stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = stream.take_serial() ? 0 : 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.handle();
  config.attrs = &attribute;
  config.numAttrs = 1;
  FT_CUDA(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...));
}

}  // namespace foretoken::kernels::cuda
