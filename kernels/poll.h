// poll_until: waits for what can only be asked whether it has happened, as a GPU's work; a wait
// that others offer would have no deadline.
#pragma once

#include <chrono>
#include <functional>

namespace foretoken::kernels {

struct PollLimits {
  std::chrono::microseconds busy;      // first it asks without a pause: what a step waits for
  std::chrono::microseconds pause;     // then with one
  std::chrono::milliseconds deadline;  // of the whole
};

// For the end of a connection, which a peer or a link that is gone must not hold.
inline constexpr PollLimits kEndLimits{.busy = std::chrono::microseconds(0),
                                       .pause = std::chrono::milliseconds(1),
                                       .deadline = std::chrono::seconds(2)};

// Whether it has happened by the deadline. In the pauses `meanwhile` is called, about every 100 ms.
bool poll_until(const std::function<bool()>& has_happened, const PollLimits& limits,
                const std::function<void()>& meanwhile);

}  // namespace foretoken::kernels
