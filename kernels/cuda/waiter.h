// Waiter: the host's waits for the GPU, each with a deadline. CUDA's own waits have none, and a
// kernel that waits for a dead peer never ends.
//
// Thread-safe once set_check() was called.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace foretoken::kernels::cuda {

class Waiter {
 public:
  // As Device::set_wait_check.
  void set_check(std::function<void()> check) { check_ = std::move(check); }

  // Until what the stream, or the event, stands for has run. Throws Exception(kDevice) where the
  // GPU failed, or isn't done by the deadline.
  void wait_for(cudaStream_t stream) const;
  void wait_for(cudaEvent_t event) const;

 private:
  void wait(const std::function<cudaError_t()>& query) const;
  std::function<void()> check_ = [] {};
};

// Whether a query says that all is done. Throws Exception(kDevice) where the GPU failed.
bool is_done(cudaError_t status);

}  // namespace foretoken::kernels::cuda
