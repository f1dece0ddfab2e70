#include "worker/internal/heart.h"

#include <exception>

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

void Heart::check() const {
  if (lost_) throw Exception(ErrorCode::kUnavailable, why_ + ": this rank ends");
}

void Heart::beat(const RankConfig& config, Epoch epoch, int rank, const std::stop_token& stop) {
  try {
    beat_on(config, epoch, rank, stop);
  } catch (const std::exception& failure) {
    why_ = "heartbeats to the coordinator at " + config.coordinator + " failed: " + failure.what();
    lost_ = true;
  }
}

// Until the coordinator is lost.
void Heart::beat_on(const RankConfig& config, Epoch epoch, int rank, const std::stop_token& stop) {
  Line line(config);
  // Counted in beats, so that a time in which this process stood still is no silence.
  const std::int64_t most = config.coordinator_timeout / kInterval;
  for (std::int64_t unanswered = 0; unanswered < most;) {
    if (stop.stop_requested()) return;
    line.send(Heartbeat{epoch, config.group, rank});
    unanswered = is_answered(line) ? 0 : unanswered + 1;
  }
  why_ = "the coordinator at " + config.coordinator + " was silent for " +
         std::to_string(config.coordinator_timeout.count()) + " s";
  lost_ = true;
}

}  // namespace foretoken::worker
