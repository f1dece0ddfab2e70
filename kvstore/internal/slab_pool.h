// SlabPool: the slabs of one KV head: which are free, whose they are, and which prefix they hold.
//
//   free       empty; also every slab past the ready mark (not pre-faulted yet), which can't be had
//   private    held by one sequence, which fills it
//   published  holds the segment that its key names; shared by all who find it
//   cached     published, and held by nobody: given up, least recently used first, when an empty
//              slab is wanted and there is none
//
// Every slab is in exactly one of these. Beside that, one that KV which failed its check was read
// from is distrusted: it is not published again, and when it is free the others are taken first, as
// the memory may be what is bad. Whoever takes it then begins anew. Not thread-safe. Example:
// tests/kvstore/store_book_test.cc
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "common/prefix_key.h"

namespace foretoken::kvstore {

enum class SlabIndex : std::uint32_t {};  // within its head's stripe

class SlabPool {
 public:
  explicit SlabPool(std::uint32_t num_slabs);

  // Slabs [0, num_ready) may be handed out from now on. Only ever grows.
  void set_ready(std::uint32_t num_ready);

  // No more become ready: those that are, are all.
  void settle() { slabs_.resize(num_ready_); }

  // An empty slab, held once, private. nullopt: all are held. Forgets a cached prefix if it must.
  std::optional<SlabIndex> acquire();

  // The slab that holds `key`, held once more. nullopt: there is none.
  std::optional<SlabIndex> find(const PrefixKey& key);

  // The same without holding it.
  std::optional<SlabIndex> peek(const PrefixKey& key) const;

  // How many of the leading keys are there; nothing is held. `cached` counts those nobody holds
  // now.
  struct Run {
    std::uint32_t length = 0;
    std::uint32_t cached = 0;
  };
  Run longest_run(std::span<const PrefixKey> keys) const;

  // Makes a private slab published. False, and nothing changes, where it is published already or
  // distrusted, or another slab holds the key.
  bool publish(SlabIndex slab, const PrefixKey& key);

  // Makes a published slab private again, if it still is published. REQUIRES: !is_shared(slab).
  void unpublish(SlabIndex slab);
  // Whether the slab has more holders than one.
  bool is_shared(SlabIndex slab) const;

  // Its key is forgotten; who holds it keeps it. REQUIRES: it is held.
  void distrust(SlabIndex slab);

  // Takes back one hold. The last one frees a private slab and caches a published one.
  void release(SlabIndex slab);

  std::uint32_t num_slabs() const { return static_cast<std::uint32_t>(slabs_.size()); }
  std::uint32_t num_ready() const { return num_ready_; }
  std::uint32_t num_free() const { return num_ready_ - num_used_ - num_cached(); }
  std::uint32_t num_used() const { return num_used_; }  // private, or published and held
  std::uint32_t num_cached() const { return static_cast<std::uint32_t>(cached_.size()); }
  std::uint32_t num_available() const { return num_ready_ - num_used_; }  // to acquire()
  std::uint64_t num_evictions() const { return num_evictions_; }

  // Recounts everything; ends the process where a slab is in two states or in none. For tests.
  void check() const;

 private:
  struct Slab {
    std::uint32_t holds = 0;
    bool published = false;
    bool distrusted = false;
    PrefixKey key;                                // if published
    std::list<SlabIndex>::iterator cached_place;  // if cached
  };
  Slab& at(SlabIndex slab);
  std::optional<SlabIndex> take_empty();
  SlabIndex evict();
  void unname(Slab& slab);

  std::vector<Slab> slabs_;
  std::uint32_t num_ready_ = 0;
  std::uint32_t num_fresh_ = 0;       // slabs [0, num_fresh_) have been handed out at least once
  std::vector<SlabIndex> emptied_;    // of those, the ones that are free again
  std::deque<SlabIndex> distrusted_;  // ... and are not trusted
  std::list<SlabIndex> cached_;       // least recently used first
  std::unordered_map<PrefixKey, SlabIndex> by_key_;
  std::uint32_t num_used_ = 0;
  std::uint64_t num_evictions_ = 0;
};

}  // namespace foretoken::kvstore
