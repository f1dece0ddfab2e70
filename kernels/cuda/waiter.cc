#include "kernels/cuda/waiter.h"

#include "kernels/cuda/cuda_check.h"
#include "kernels/poll.h"

namespace foretoken::kernels::cuda {
namespace {

// A decode step is over within the busy time, so its tokens are seen at once; the deadline is
// shorter than what the coordinator waits for a step (120 s), so that the reason gets there.
constexpr PollLimits kLimits{.busy = std::chrono::milliseconds(30),
                             .pause = std::chrono::microseconds(50),
                             .deadline = std::chrono::seconds(100)};

}  // namespace

bool is_done(cudaError_t status) {
  if (status == cudaErrorNotReady) {
    cudaGetLastError();  // or the next launch would be taken for a failed one
    return false;
  }
  check(status, "the GPU's work");
  return true;
}

void Waiter::wait(const std::function<cudaError_t()>& query) const {
  if (poll_until([&] { return is_done(query()); }, kLimits, check_)) return;
  throw Exception(ErrorCode::kDevice,
                  "the GPU has not finished its work within 100 s: a kernel hangs, or waits for a "
                  "rank that is gone; look for Xid errors in the kernel's log and at nvidia-smi");
}

void Waiter::wait_for(cudaStream_t stream) const {
  wait([stream] { return cudaStreamQuery(stream); });
}
void Waiter::wait_for(cudaEvent_t event) const {
  wait([event] { return cudaEventQuery(event); });
}

}  // namespace foretoken::kernels::cuda
