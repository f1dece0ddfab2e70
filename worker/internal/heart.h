// Heart: the thread that says every 250 ms that this rank lives, and which step it completed last.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "worker/internal/line.h"

namespace foretoken::worker {

// The coordinator answers each beat; where it no longer does, it is gone, or has given this rank
// up.
class Heart {
 public:
  Heart(const RankConfig& config, Epoch epoch, int rank)
      : thread_([this, config, epoch, rank](const std::stop_token& stop) {
          beat(config, epoch, rank, stop);
        }) {}
  void completed(StepNumber step) { step_ = raw(step); }
  bool lost_coordinator() const { return lost_; }

 private:
  void beat(const RankConfig& config, Epoch epoch, int rank, const std::stop_token& stop);

  std::atomic<std::uint64_t> step_{0};
  std::atomic<bool> lost_{false};
  std::jthread thread_;  // last: it starts when all else is ready
};

}  // namespace foretoken::worker
