// FT_CUDA(call): throws Exception(kDevice) with what was called and what CUDA says about it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "common/result.h"

namespace foretoken::kernels::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error would be reported again by the next call
  std::string message = std::string(what) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) {
    message += "; others use this GPU too, or --gpu-memory-utilization leaves too little beside it";
  }
  throw Exception(ErrorCode::kDevice, std::move(message));
}

}  // namespace foretoken::kernels::cuda

#define FT_CUDA(call) ::foretoken::kernels::cuda::check((call), #call)
