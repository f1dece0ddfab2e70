// NvmeHealth: whether the NVMe tier may read and write now, by what its operations came to.
//
// A full file system stops writes, kMaxFailures failures in a row (or one operation that never
// ends) stop everything; after a pause, which doubles up to half a minute, it is tried again. A
// success ends it. Pure; times are the caller's. Example: tests/kvstore/nvme_tier_test.cc
#pragma once

#include <chrono>

#include "kvstore/kv_store.h"

namespace foretoken::kvstore {

using TimePoint = std::chrono::steady_clock::time_point;

class NvmeHealth {
 public:
  static constexpr int kMaxFailures = 3;  // in a row
  static constexpr std::chrono::seconds kFirstPause{1};
  static constexpr std::chrono::seconds kLongestPause{30};

  NvmeState state() const { return state_; }
  bool may_read(TimePoint now) const;
  bool may_write(TimePoint now) const;

  void on_read(TimePoint now);
  void on_written(TimePoint now);
  void on_full(TimePoint now);
  void on_failed(TimePoint now);
  void on_stalled(TimePoint now);

 private:
  void enter(NvmeState state, TimePoint now);

  NvmeState state_ = NvmeState::kOnline;
  int num_failures_ = 0;  // in a row
  std::chrono::seconds pause_ = kFirstPause;
  TimePoint retry_at_{};
};

}  // namespace foretoken::kvstore
