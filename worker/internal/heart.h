// Heart: the thread that says every 250 ms that this rank lives.
#pragma once

#include <atomic>
#include <chrono>
#include <string>
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
  // Throws Exception(kUnavailable) where the coordinator is lost, or the thread has failed: without
  // beats this rank is given up, and nobody would tell it.
  void check() const;

 private:
  void beat(const RankConfig& config, Epoch epoch, int rank, const std::stop_token& stop);
  void beat_on(const RankConfig& config, Epoch epoch, int rank, const std::stop_token& stop);

  std::string why_;
  std::atomic<bool> lost_{false};  // then why_ stands
  std::jthread thread_;            // last: it starts when all else is ready
};

}  // namespace foretoken::worker
