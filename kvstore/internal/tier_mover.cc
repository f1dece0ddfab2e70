#include "kvstore/internal/tier_mover.h"

#include <utility>

namespace foretoken::kvstore {

TierMover::TierMover(StoreBook& book, NvmeTier& tier, SlabMemory memory, std::size_t max_queued)
    : book_(book), tier_(tier), memory_(std::move(memory)), max_queued_(max_queued) {}

// ---- to the file ------------------------------------------------------------------------------

void TierMover::write_behind(const SlabName& name) {
  if (to_write_.size() >= max_queued_) {  // the oldest has hardly a chance to be there still
    to_write_.pop_front();
    ++num_dropped_;
  }
  to_write_.push_back(name);
}

void TierMover::write_next(TimePoint now) {
  while (can_write(now)) {
    const SlabName name = to_write_.front();
    to_write_.pop_front();
    if (tier_.knows(name)) continue;
    const auto slab = book_.find_published(name.head, name.key);
    if (slab) return tier_.store(name, memory_(name.head, *slab), now);
    ++num_dropped_;
  }
}

// ---- from the file ----------------------------------------------------------------------------

// Segment by segment over all heads: what has come when somebody waits no longer is of use, since
// the shortest run of a rank's heads counts.
std::set<SlabName> TierMover::promote(int first_head, int num_heads,
                                      std::span<const PrefixKey> keys, TimePoint now) {
  std::set<SlabName> awaited;
  std::set<int> ended;  // heads whose run of hits is over
  for (const PrefixKey& key : keys) {
    for (int head = first_head; head < first_head + num_heads; ++head) {
      if (ended.contains(head)) continue;
      if (!promote_one({head, key}, now, awaited)) ended.insert(head);
    }
  }
  return awaited;
}

// False: neither tier has it, or the arena has no slab for it. What the arena has is refreshed, so
// that it doesn't give way to what is brought back behind it.
bool TierMover::promote_one(const SlabName& name, TimePoint now, std::set<SlabName>& awaited) {
  if (book_.refresh(name.head, name.key)) {
    tier_.touch(name);
    return true;
  }
  if (!promoting_.contains(name)) {
    if (!tier_.has(name, now)) return false;
    const auto slab = book_.take_slab(name.head);
    if (!slab) return false;
    promoting_.emplace(name, *slab);
    tier_.load(name, memory_(name.head, *slab), now);
  }
  awaited.insert(name);
  return true;
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

NvmeStat TierMover::stat() const {
  NvmeStat stat = tier_.stat();
  stat.dropped = num_dropped_;
  return stat;
}

}  // namespace foretoken::kvstore
