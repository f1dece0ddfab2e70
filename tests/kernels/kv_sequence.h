// KvSequence: one sequence's tables, slots and slabs on a device, for tests of the ops that use
// them. Slabs are plain memory, as the arena's are on the CPU device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/kv_layout.h"

namespace foretoken::kernels {

class KvSequence {
 public:
  KvSequence(const KvShape& shape, int num_slots, int max_blocks)
      : num_heads_(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads)),
        slots_(num_heads_ * static_cast<std::size_t>(num_slots) * shape.block_bytes()),
        block_to_slot_(num_heads_ * static_cast<std::size_t>(max_blocks), kAbsent),
        slot_to_block_(num_heads_ * static_cast<std::size_t>(num_slots), kAbsent) {
    const int max_segments = (max_blocks + kSegmentBlocks - 1) / kSegmentBlocks;
    for (int i = 0; i < shape.num_kv_heads * max_segments; ++i) {
      slab_memory_.emplace_back(shape.slab_bytes());
    }
    for (auto& slab : slab_memory_) slabs_.push_back(slab.data());
    view = {slots_.data(),
            block_to_slot_.data(),
            slot_to_block_.data(),
            slabs_.data(),
            &length,
            num_slots,
            max_blocks,
            max_segments,
            shape};
    view.mismatches = &mismatches;
  }
  KvSequence(const KvSequence&) = delete;
  KvSequence& operator=(const KvSequence&) = delete;

  std::size_t head(int layer, int kv_head) const {
    return static_cast<std::size_t>(layer * view.shape.num_kv_heads + kv_head);
  }
  std::int32_t& slot(int layer, int kv_head, int block) {
    return block_to_slot_[head(layer, kv_head) * static_cast<std::size_t>(view.max_blocks) +
                          static_cast<std::size_t>(block)];
  }
  std::int32_t& block(int layer, int kv_head, int slot) {
    return slot_to_block_[head(layer, kv_head) * static_cast<std::size_t>(view.num_slots) +
                          static_cast<std::size_t>(slot)];
  }
  void place(int layer, int kv_head, int block_index, int slot_index) {
    slot(layer, kv_head, block_index) = slot_index;
    block(layer, kv_head, slot_index) = block_index;
  }
  std::byte* slot_data(int layer, int kv_head, int slot_index) {
    return slots_.data() + slot_offset(view, layer, kv_head, slot_index);
  }
  std::byte* slab(int kv_head, int block) {
    return slabs_[static_cast<std::size_t>(kv_head * view.max_segments + block / kSegmentBlocks)];
  }
  std::byte* arena_data(int layer, int kv_head, int block) {
    return slab(kv_head, block) + slab_block_offset(view.shape, layer, block);
  }

  // The same KV as an outsized sequence's: runs and checksums by themselves, in the same memory.
  void make_outsized() {
    for (int layer = 0; layer < view.shape.num_layers; ++layer) {
      for (int head_and_segment = 0; head_and_segment < std::ssize(slabs_); ++head_and_segment) {
        std::byte* slab = slabs_[static_cast<std::size_t>(head_and_segment)];
        runs.push_back(slab + slab_block_offset(view.shape, layer, 0));
        for (int block = 0; block < kSegmentBlocks; ++block) {
          std::uint64_t checksum = 0;
          std::memcpy(&checksum, slab + slab_checksum_offset(view.shape, layer, block), 8);
          checksums.push_back(checksum);
        }
      }
    }
    view.runs = runs.data();
    view.checksums = checksums.data();
    view.slabs = nullptr;
  }

  std::int32_t length = 0;
  std::uint32_t mismatches = 0;
  SequenceKv view;
  std::vector<std::byte*> runs;  // after make_outsized()
  std::vector<std::uint64_t> checksums;

 private:
  std::size_t num_heads_;
  std::vector<std::byte> slots_;
  std::vector<std::int32_t> block_to_slot_;
  std::vector<std::int32_t> slot_to_block_;
  std::vector<std::vector<std::byte>> slab_memory_;
  std::vector<std::byte*> slabs_;
};

// A policy's choice and a fetch list of fixed width for every (layer, head).
struct SelectionTable {
  SelectionTable(const KvShape& shape, int max_selected)
      : blocks(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads * max_selected)),
        counts(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads)),
        view{blocks.data(), counts.data(), max_selected} {}
  std::vector<std::int32_t> blocks;
  std::vector<std::int32_t> counts;
  Selection view;
};
struct FetchTable {
  FetchTable(const KvShape& shape, int max_entries)
      : entries(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads * max_entries)),
        counts(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads)),
        view{entries.data(), counts.data(), max_entries} {}
  std::vector<FetchEntry> entries;
  std::vector<std::int32_t> counts;
  FetchList view;
};

}  // namespace foretoken::kernels
