// NvmeIndex: which slot of the NVMe file holds which slab, and which slot is given up next.
//
//   free      may be claimed; those that were given back first come first
//   held      has a name; claimed, least recently used first, when nothing is free
//   pinned    being read or written, or a running sequence's: not claimed. It is held; or promised,
//             with a name and a place among the held ones that nobody finds yet; or has no name,
//             and is free at the last unpin
//
// Pure bookkeeping. Not thread-safe. Example: tests/kvstore/nvme_tier_test.cc
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvstore/internal/nvme_format.h"

namespace foretoken::kvstore {

class NvmeIndex {
 public:
  // `held`: what stands in the file at its opening, least recently used first; each slot and each
  // name at most once. `left_out`, in order and not held: slots that are never used. The others are
  // free.
  explicit NvmeIndex(std::uint32_t num_slots, std::span<const SlotHeader> held = {},
                     std::span<const SlotIndex> left_out = {});

  struct Entry {
    SlotIndex slot{};
    std::uint64_t digest = 0;
    Seal seal;
    std::optional<PrefixKey> previous = {};  // of the segment before
  };
  std::optional<Entry> find(const SlabName& name) const;
  // Held, or promised.
  bool knows(const SlabName& name) const { return by_name_.contains(name); }
  // The first held slot at or after `from`, going round. nullopt: nothing is held.
  struct Held {
    SlabName name;
    Entry entry;
  };
  std::optional<Held> held_from(SlotIndex from) const;
  // The slab was wanted: it is the last to give way. No-op for a name that is not there.
  void touch(const SlabName& name);
  // The last use of a prefix that ends with this slab, numbered as slabs are that are written.
  // REQUIRES: it is held.
  void note_use(const SlabName& name, std::uint64_t number);
  struct Use {
    Held slab;
    std::uint64_t number = 0;
  };
  // All that were noted since, of slabs that are there; the latest first.
  std::vector<Use> take_uses();
  // The slab gives way just before the other one, or just behind it. No-op where one of them is not
  // there.
  void place_before(const SlabName& name, const SlabName& other);
  void place_behind(const SlabName& name, const SlabName& other);

  // Slots to write to, pinned and without a name. Forgets slabs if it must. Takes the time of the
  // pinned ones before them once, whatever `count`. REQUIRES: as many are available.
  std::vector<SlotIndex> claim(std::size_t count);
  // A pinned slot is to hold this slab, the last one to give way. REQUIRES: it has no name, and the
  // name is not there.
  void promise(SlotIndex slot, const SlabName& name);
  bool is_promised(SlotIndex slot, const SlabName& name) const;
  // ... and does. REQUIRES: it is promised.
  void hold(SlotIndex slot, std::uint64_t digest, const Seal& seal = {},
            const std::optional<PrefixKey>& previous = std::nullopt);

  // Pins count. They say nothing of use: touch() does. REQUIRES: held, or pinned already.
  void pin(SlotIndex slot);
  void unpin(SlotIndex slot);
  std::optional<SlabName> name_of(SlotIndex slot) const {
    return slots_.at(static_cast<std::size_t>(slot)).name;
  }
  // Forgets the name; its slot is free once no pin is left. REQUIRES: knows(name).
  void erase(const SlabName& name);

  std::uint32_t num_slots() const { return static_cast<std::uint32_t>(slots_.size()); }
  std::uint32_t num_usable() const { return num_usable_; }
  std::uint32_t num_available() const { return num_usable_ - num_pinned_; }  // to claim()
  std::uint32_t num_held() const { return num_held_; }
  std::uint32_t num_promised() const {
    return static_cast<std::uint32_t>(by_name_.size()) - num_held_;
  }
  std::int64_t num_evictions() const { return num_evictions_; }

  // Recounts everything; ends the process where a slot is in two states or in none. For tests.
  void check() const;

 private:
  struct Slot {
    std::optional<SlabName> name;  // held, or promised
    bool is_held = false;
    std::uint64_t digest = 0;
    Seal seal;
    std::optional<PrefixKey> previous;
    std::optional<std::uint64_t> use;  // that was noted
    int pins = 0;
    std::list<SlotIndex>::iterator place;  // in used_, with a name
  };
  Slot& at(SlotIndex slot);
  void add_pin(Slot& slot);
  void evict(SlotIndex slot);
  Slot* find_slot(const SlabName& name);
  Entry entry_of(SlotIndex slot) const;

  std::vector<Slot> slots_;
  std::uint32_t num_usable_;      // of them, that are not left out
  std::uint32_t num_pinned_ = 0;  // of these
  std::uint32_t num_held_ = 0;
  std::deque<SlotIndex> free_;
  std::list<SlotIndex> used_;  // with a name, least recently used first
  std::unordered_map<SlabName, SlotIndex> by_name_;
  std::int64_t num_evictions_ = 0;
};

}  // namespace foretoken::kvstore
