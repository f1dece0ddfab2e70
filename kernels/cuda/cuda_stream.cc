#include "kernels/cuda/cuda_stream.h"

#include <cuda_runtime.h>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"

namespace foretoken::kernels::cuda {

CudaStream::CudaStream(StreamKind kind, const Waiter& waiter) : kind_(kind), waiter_(waiter) {
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
  for (std::byte* scratch : recorded_scratch_) cudaFree(scratch);
  cudaFree(counters_);
  cudaStreamDestroy(handle_);
}

void CudaStream::synchronize() { waiter_.wait_for(handle_); }

std::byte* CudaStream::scratch(std::size_t bytes) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  FT_CUDA(cudaStreamIsCapturing(handle_, &status));
  const bool recording = status != cudaStreamCaptureStatusNone;
  if (bytes > scratch_bytes_) {
    FT_CHECK(!recording, bytes, scratch_bytes_);
    grow_scratch(bytes);
  }
  scratch_recorded_ = scratch_recorded_ || recording;
  return scratch_;
}

void CudaStream::grow_scratch(std::size_t bytes) {
  if (scratch_recorded_) {
    recorded_scratch_.push_back(scratch_);
  } else {
    synchronize();
    FT_CUDA(cudaFree(scratch_));
  }
  scratch_ = nullptr;
  scratch_bytes_ = 0;
  scratch_recorded_ = false;
  FT_CUDA(cudaMalloc(&scratch_, bytes));
  scratch_bytes_ = bytes;
}

}  // namespace foretoken::kernels::cuda
