#include "kvstore/internal/tier_mover.h"

#include <utility>

#include "common/log.h"

namespace foretoken::kvstore {

TierMover::TierMover(StoreBook& book, NvmeTier& tier, SlabMemory memory, std::size_t max_queued)
    : book_(book), tier_(tier), memory_(std::move(memory)), max_queued_(max_queued) {}

// ---- to the file ------------------------------------------------------------------------------

void TierMover::write_behind(const SlabName& name, const std::optional<PrefixKey>& previous) {
  if (to_write_.size() >= max_queued_) {  // the oldest has hardly a chance to be there still
    to_write_.pop_front();
    ++num_dropped_;
  }
  to_write_.push_back({name, previous});
}

void TierMover::write_next(TimePoint now) {
  while (can_write(now)) {
    const auto [name, previous] = to_write_.front();
    to_write_.pop_front();
    if (tier_.knows(name)) continue;
    const auto slab = book_.find_published(name.head, name.key);
    if (!slab) {
      ++num_dropped_;
      continue;
    }
    if (tier_.store(name, memory_(name.head, *slab), now, previous)) return;
    log().warn("a slab of the arena fails its checksums on its way to NVMe; it serves nobody more");
    return book_.distrust_published(name.head, name.key);
  }
}

// ---- from the file ----------------------------------------------------------------------------

// What the arena has is refreshed, so that it doesn't give way to what is brought back behind it.
TierMover::Promoted TierMover::promote(const SlabName& name, TimePoint now) {
  if (book_.refresh(name.head, name.key)) return Promoted::kIsThere;
  if (promoting_.contains(name)) return Promoted::kComes;
  if (!tier_.has(name, now)) return Promoted::kNowhere;
  const auto slab = book_.take_slab(name.head);
  if (!slab) return Promoted::kNowhere;
  promoting_.emplace(name, *slab);
  tier_.load(name, memory_(name.head, *slab), now);
  return Promoted::kComes;
}

TierMover::Place TierMover::place_of(const SlabName& name, TimePoint now) const {
  if (book_.find_published(name.head, name.key)) return Place::kArena;
  return tier_.has(name, now) ? Place::kFile : Place::kNeither;
}

void TierMover::end_promotion(const NvmeTier::Loaded& loaded) {
  const auto found = promoting_.find(loaded.name);
  if (loaded.is_whole) book_.publish_slab(loaded.name.head, found->second, loaded.name.key);
  book_.return_slab(loaded.name.head, found->second);
  promoting_.erase(found);
}

std::vector<SlabName> TierMover::advance(TimePoint now) {
  std::vector<SlabName> ended;
  for (const NvmeTier::Loaded& loaded : tier_.advance(now)) {
    end_promotion(loaded);
    ended.push_back(loaded.name);
  }
  write_next(now);
  return ended;
}

bool TierMover::finish(TimePoint now) {
  static_cast<void>(advance(now));
  if (is_idle(now) && !std::exchange(has_saved_uses_, true)) tier_.save_uses(now);
  return is_idle(now);
}

NvmeStat TierMover::stat() const {
  NvmeStat stat = tier_.stat();
  stat.dropped = num_dropped_;
  return stat;
}

}  // namespace foretoken::kvstore
