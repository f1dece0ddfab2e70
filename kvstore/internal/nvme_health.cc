#include "kvstore/internal/nvme_health.h"

#include <algorithm>

#include "common/log.h"

namespace foretoken::kvstore {

bool NvmeHealth::may_read(TimePoint now) const {
  return state_ != NvmeState::kOffline || now >= retry_at_;
}

bool NvmeHealth::may_write(TimePoint now) const {
  return state_ == NvmeState::kOnline || now >= retry_at_;
}

void NvmeHealth::on_read(TimePoint now) {
  num_failures_ = 0;
  if (state_ == NvmeState::kOffline) enter(NvmeState::kOnline, now);
}

void NvmeHealth::on_written(TimePoint now) {
  num_failures_ = 0;
  if (state_ != NvmeState::kOnline) enter(NvmeState::kOnline, now);
}

void NvmeHealth::on_full(TimePoint now) {
  num_failures_ = 0;
  enter(NvmeState::kReadOnly, now);
}

void NvmeHealth::on_failed(TimePoint now) {
  if (++num_failures_ >= kMaxFailures) enter(NvmeState::kOffline, now);
}

void NvmeHealth::on_stalled(TimePoint now) { enter(NvmeState::kOffline, now); }

// A state that is entered again doubles the pause, but only once a pause: operations fail together.
void NvmeHealth::enter(NvmeState state, TimePoint now) {
  if (state == state_ && now < retry_at_) return;
  if (state != state_) {
    log().warn("NVMe tier: {}", nvme_state_name(state));
    pause_ = kFirstPause;
  } else {
    pause_ = std::min(2 * pause_, kLongestPause);
  }
  state_ = state;
  retry_at_ = now + pause_;
}

}  // namespace foretoken::kvstore
