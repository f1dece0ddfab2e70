#include "kernels/poll.h"

#include <thread>

namespace foretoken::kernels {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kMeanwhileInterval{100};

}  // namespace

bool poll_until(const std::function<bool()>& has_happened, const PollLimits& limits,
                const std::function<void()>& meanwhile) {
  if (has_happened()) return true;
  const auto begin = Clock::now();
  auto next_meanwhile = begin + kMeanwhileInterval;
  for (;;) {
    if (has_happened()) return true;
    const auto now = Clock::now();
    if (now - begin < limits.busy) continue;
    if (now - begin >= limits.deadline) return false;
    if (now >= next_meanwhile) {
      meanwhile();
      next_meanwhile = now + kMeanwhileInterval;
    }
    std::this_thread::sleep_for(limits.pause);
  }
}

}  // namespace foretoken::kernels
