#include "kvstore/internal/nvme_index.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <set>
#include <utility>

#include "common/check.h"
#include "common/ids.h"

namespace foretoken::kvstore {

NvmeIndex::NvmeIndex(std::uint32_t num_slots, std::span<const SlotHeader> held,
                     std::span<const SlotIndex> left_out)
    : slots_(num_slots), num_usable_(num_slots - static_cast<std::uint32_t>(left_out.size())) {
  for (const SlotHeader& header : held) {
    promise(header.slot, header.name);
    hold(header.slot, header.digest, header.seal, header.previous);
  }
  for (std::uint32_t i = 0; i < num_slots; ++i) {
    const bool is_left_out = std::ranges::binary_search(left_out, SlotIndex{i});
    if (!slots_[i].name && !is_left_out) free_.push_back(SlotIndex{i});
  }
}

NvmeIndex::Slot& NvmeIndex::at(SlotIndex slot) {
  FT_CHECK(raw(slot) < slots_.size(), raw(slot), slots_.size());
  return slots_[raw(slot)];
}

std::optional<NvmeIndex::Entry> NvmeIndex::find(const SlabName& name) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) return std::nullopt;
  if (!slots_[raw(found->second)].is_held) return std::nullopt;
  return entry_of(found->second);
}

NvmeIndex::Entry NvmeIndex::entry_of(SlotIndex index) const {
  const Slot& slot = slots_[raw(index)];
  return {index, slot.digest, slot.seal, slot.previous};
}

std::optional<NvmeIndex::Held> NvmeIndex::held_from(SlotIndex from) const {
  for (std::uint32_t i = 0; i < num_slots(); ++i) {
    const std::uint32_t at = (raw(from) % num_slots() + i) % num_slots();
    if (slots_[at].is_held) return Held{*slots_[at].name, entry_of(SlotIndex{at})};
  }
  return std::nullopt;
}

NvmeIndex::Slot* NvmeIndex::find_slot(const SlabName& name) {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &at(found->second);
}

void NvmeIndex::touch(const SlabName& name) {
  if (const Slot* slot = find_slot(name)) used_.splice(used_.end(), used_, slot->place);
}

void NvmeIndex::note_use(const SlabName& name, std::uint64_t number) {
  Slot* slot = find_slot(name);
  FT_CHECK(slot != nullptr && slot->is_held);
  slot->use = number;
}

std::vector<NvmeIndex::Use> NvmeIndex::take_uses() {
  std::vector<Use> uses;
  for (std::uint32_t i = 0; i < num_slots(); ++i) {
    const auto use = std::exchange(slots_[i].use, std::nullopt);
    if (use) uses.push_back({{*slots_[i].name, entry_of(SlotIndex{i})}, *use});
  }
  std::ranges::sort(uses, std::greater(), &Use::number);
  return uses;
}

void NvmeIndex::place_before(const SlabName& name, const SlabName& other) {
  const Slot* slot = find_slot(name);
  const Slot* place = find_slot(other);
  if (slot != nullptr && place != nullptr) used_.splice(place->place, used_, slot->place);
}

void NvmeIndex::place_behind(const SlabName& name, const SlabName& other) {
  const Slot* slot = find_slot(name);
  const Slot* place = find_slot(other);
  if (slot != nullptr && place != nullptr) {
    used_.splice(std::next(place->place), used_, slot->place);
  }
}

std::vector<SlotIndex> NvmeIndex::claim(std::size_t count) {
  FT_CHECK(count <= num_available(), count, num_available());
  std::vector<SlotIndex> slots;
  slots.reserve(count);
  for (; slots.size() < count && !free_.empty(); free_.pop_front()) slots.push_back(free_.front());
  for (auto next = used_.begin(); slots.size() < count;) {
    const SlotIndex slot = *next++;
    if (at(slot).pins > 0) continue;
    evict(slot);
    slots.push_back(slot);
  }
  for (const SlotIndex slot : slots) add_pin(at(slot));
  return slots;
}

void NvmeIndex::evict(SlotIndex slot) {
  erase(*at(slot).name);
  free_.pop_back();  // where erase() has put it
  ++num_evictions_;
}

void NvmeIndex::promise(SlotIndex index, const SlabName& name) {
  Slot& slot = at(index);
  FT_CHECK(!slot.name && by_name_.try_emplace(name, index).second, raw(index));
  slot.name = name;
  slot.place = used_.insert(used_.end(), index);
}

bool NvmeIndex::is_promised(SlotIndex index, const SlabName& name) const {
  const Slot& slot = slots_.at(raw(index));
  return slot.name == name && !slot.is_held;
}

void NvmeIndex::hold(SlotIndex index, std::uint64_t digest, const Seal& seal,
                     const std::optional<PrefixKey>& previous) {
  Slot& slot = at(index);
  FT_CHECK(slot.name && !slot.is_held, raw(index));
  slot.is_held = true;
  slot.digest = digest;
  slot.seal = seal;
  slot.previous = previous;
  ++num_held_;
}

void NvmeIndex::pin(SlotIndex index) {
  Slot& slot = at(index);
  FT_CHECK(slot.name || slot.pins > 0, raw(index));
  add_pin(slot);
}

void NvmeIndex::add_pin(Slot& slot) {
  if (slot.pins++ == 0) ++num_pinned_;
}

void NvmeIndex::unpin(SlotIndex index) {
  Slot& slot = at(index);
  FT_CHECK(slot.pins > 0, raw(index));
  if (--slot.pins > 0) return;
  --num_pinned_;
  if (!slot.name) free_.push_back(index);
}

void NvmeIndex::erase(const SlabName& name) {
  const auto found = by_name_.find(name);
  FT_CHECK(found != by_name_.end());
  const SlotIndex index = found->second;
  Slot& slot = at(index);
  slot.name.reset();
  slot.use.reset();
  if (std::exchange(slot.is_held, false)) --num_held_;
  by_name_.erase(found);
  used_.erase(slot.place);
  if (slot.pins == 0) free_.push_back(index);
}

void NvmeIndex::check() const {
  const std::set<SlotIndex> free(free_.begin(), free_.end());
  const std::set<SlotIndex> used(used_.begin(), used_.end());
  FT_CHECK(free.size() == free_.size() && used.size() == used_.size());
  std::size_t held = 0;
  std::size_t pinned = 0;
  for (std::uint32_t i = 0; i < num_slots(); ++i) {
    const Slot& slot = slots_[i];
    FT_CHECK(used.contains(SlotIndex{i}) == slot.name.has_value(), i, slot.pins);
    FT_CHECK(!free.contains(SlotIndex{i}) || (!slot.name && slot.pins == 0), i);
    if (slot.pins > 0) ++pinned;
    if (slot.is_held) ++held;
    FT_CHECK(slot.name || !slot.is_held, i);
    FT_CHECK(!slot.name || slot.is_held || slot.pins > 0, i);
    FT_CHECK(!slot.name || by_name_.at(*slot.name) == SlotIndex{i}, i);
  }
  FT_CHECK(used_.size() == by_name_.size(), used_.size(), by_name_.size());
  FT_CHECK(held == num_held_, held, num_held_);
  FT_CHECK(pinned == num_pinned_, pinned, num_pinned_);
}

}  // namespace foretoken::kvstore
