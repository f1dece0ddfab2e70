#include "kernels/cuda/cuda_stream.h"

#include <cuda_runtime.h>

#include <algorithm>

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
  scratch_.free();
  mailbox_.free();
  cudaFree(counters_);
  cudaStreamDestroy(handle_);
}

void CudaStream::synchronize() { waiter_.wait_for(handle_); }

std::byte* CudaStream::Memory::take(std::size_t bytes, CudaStream& stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  FT_CUDA(cudaStreamIsCapturing(stream.handle(), &status));
  const bool recording = status != cudaStreamCaptureStatusNone;
  if (bytes > bytes_) {
    FT_CHECK(!recording, bytes, bytes_);
    grow(std::max(bytes, 2 * bytes_), stream);  // what graphs keep adds up to no more than this
  }
  recorded_ = recorded_ || recording;
  return data_;
}

void CudaStream::Memory::grow(std::size_t bytes, CudaStream& stream) {
  if (recorded_) {
    outgrown_.push_back(data_);
  } else {
    stream.synchronize();
    FT_CUDA(cudaFree(data_));
  }
  data_ = nullptr;
  bytes_ = 0;
  recorded_ = false;
  FT_CUDA(cudaMalloc(&data_, bytes));
  FT_CUDA(cudaMemsetAsync(data_, 0xFF, bytes, stream.handle()));
  bytes_ = bytes;
}

void CudaStream::Memory::free() {
  cudaFree(data_);
  for (std::byte* data : outgrown_) cudaFree(data);
}

}  // namespace foretoken::kernels::cuda
