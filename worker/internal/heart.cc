#include "worker/internal/heart.h"

#include "common/log.h"

namespace foretoken::worker {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kInterval{250};

// Takes what comes until the next beat is due.
bool is_answered(Line& line) {
  const auto due = std::chrono::steady_clock::now() + kInterval;
  bool answered = false;
  for (auto left = kInterval; left > milliseconds(0);
       left = std::chrono::ceil<milliseconds>(due - std::chrono::steady_clock::now())) {
    answered = line.receive(left).has_value() || answered;
  }
  return answered;
}

}  // namespace

void Heart::beat(const RankConfig& config, Epoch epoch, int rank, const std::stop_token& stop) {
  try {
    Line line(config);
    // Counted in beats, so that a time in which this process stood still is no silence.
    const std::int64_t most = config.coordinator_timeout / kInterval;
    std::int64_t unanswered = 0;
    while (!stop.stop_requested()) {
      line.send(Heartbeat{epoch, config.group, rank, StepNumber{step_.load()}});
      unanswered = is_answered(line) ? 0 : unanswered + 1;
      if (unanswered >= most) lost_ = true;
    }
  } catch (const std::exception& failure) {
    // The coordinator will miss the beats, and fence this rank.
    log().error("heartbeat stopped: {}", failure.what());
  }
}

}  // namespace foretoken::worker
