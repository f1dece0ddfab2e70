// TierMover: moves slabs between the arena and the NVMe tier. What is published is written behind;
// what a reservation asks for, and only the file has, is brought back into slabs of its own, which
// then hold their prefix as if they had never left.
//
// A slab that leaves the arena before its turn to be written is dropped, not kept: keeping it would
// make admissions wait for the disk, and the tier may lose anything.
//
// For the store's thread. Example: tests/kvstore/nvme_store_test.cc
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "common/prefix_key.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/store_book.h"

namespace foretoken::kvstore {

class TierMover {
 public:
  using SlabMemory = std::function<std::byte*(int head, SlabIndex slab)>;

  // All three must outlive it; max_queued: slabs that may wait to be written.
  TierMover(StoreBook& book, NvmeTier& tier, SlabMemory memory, std::size_t max_queued);

  // The slab was just published: written when its turn comes. `previous`: NvmeTier::store()'s.
  void write_behind(const SlabName& name, const std::optional<PrefixKey>& previous = std::nullopt);

  // Brings the slab back where the arena lacks it and the file has it. kComes: advance() will name
  // it; kNowhere: neither has it, or the arena has no slab for it.
  enum class Promoted { kIsThere, kComes, kNowhere };
  Promoted promote(const SlabName& name, TimePoint now);

  // Where promote() would find it.
  enum class Place { kArena, kFile, kNeither };
  Place place_of(const SlabName& name, TimePoint now) const;

  // As NvmeTier's; one slab at most is copied to be written. The names are those whose promotion
  // has ended, well or not.
  std::vector<SlabName> advance(TimePoint now);
  bool has_more(TimePoint now) const { return tier_.has_more() || can_write(now); }
  std::optional<TimePoint> deadline() const { return tier_.deadline(); }
  int completion_fd() const { return tier_.completion_fd(); }

  // At the store's end, in place of advance(), until it is true: writes what waits, and then which
  // prefixes were used last.
  bool finish(TimePoint now);
  NvmeStat stat() const;

 private:
  struct Unwritten {
    SlabName name;
    std::optional<PrefixKey> previous;
  };

  void end_promotion(const NvmeTier::Loaded& loaded);
  // Nothing is left to write that can be written now.
  bool is_idle(TimePoint now) const { return tier_.is_idle() && !can_write(now); }
  bool can_write(TimePoint now) const { return !to_write_.empty() && tier_.can_store(now); }
  void write_next(TimePoint now);

  StoreBook& book_;
  NvmeTier& tier_;
  SlabMemory memory_;
  std::size_t max_queued_;
  std::deque<Unwritten> to_write_;
  std::map<SlabName, SlabIndex> promoting_;  // into which slab of its head
  std::int64_t num_dropped_ = 0;
  bool has_saved_uses_ = false;
};

}  // namespace foretoken::kvstore
