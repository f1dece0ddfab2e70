// DeviceSequence: one sequence's slots, tables and slabs on a device under test, filled with the
// same bytes on every device, so that what ops leave behind can be compared byte by byte.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "kernels/kv_layout.h"
#include "tests/kernels/cuda/cuda_test.h"

namespace foretoken::kernels {

inline std::vector<std::byte> random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// Host memory of whole pages that ops may reach, as a stripe of the arena.
class TestArena {
 public:
  TestArena(Device& device, std::size_t bytes)
      : device_(device),
        bytes_((bytes + kPage - 1) / kPage * kPage),
        host_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_))),
        address_(device.register_host(host_, bytes_)) {}
  ~TestArena() {
    device_.unregister_host(host_);
    std::free(host_);
  }
  TestArena(const TestArena&) = delete;
  TestArena& operator=(const TestArena&) = delete;

  std::span<std::byte> host() { return {host_, bytes_}; }
  std::byte* address() const { return address_; }

 private:
  static constexpr std::size_t kPage = 4096;
  Device& device_;
  std::size_t bytes_;
  std::byte* host_;
  std::byte* address_;  // as ops see it
};

struct DeviceSequence {
  DeviceSequence(DeviceUnderTest& on, const KvShape& shape, int num_slots, int max_blocks,
                 std::uint32_t seed = 1)
      : num_heads(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads)),
        num_segments((max_blocks + kSegmentBlocks - 1) / kSegmentBlocks),
        arena(*on.device, num_slabs(shape) * shape.slab_bytes()),
        block_to_slot(num_heads * static_cast<std::size_t>(max_blocks), kAbsent),
        slot_to_block(num_heads * static_cast<std::size_t>(num_slots), kAbsent),
        slots(on, random_bytes(
                      num_heads * static_cast<std::size_t>(num_slots) * shape.block_bytes(), seed)),
        device_block_to_slot(on, block_to_slot),
        device_slot_to_block(on, slot_to_block),
        slabs(on, slab_addresses(shape)),
        length(on, {0}),
        mismatches(on, {7}),
        kv{slots.data(),
           device_block_to_slot.data(),
           device_slot_to_block.data(),
           slabs.data(),
           length.data(),
           num_slots,
           max_blocks,
           num_segments,
           shape},
        view(on, {with_mismatches()}) {
    const auto bytes = random_bytes(arena.host().size(), seed + 1);
    std::copy(bytes.begin(), bytes.end(), arena.host().begin());
  }

  // The tables are changed on the host, then uploaded; or downloaded after an op.
  std::int32_t& slot(int layer, int head, int block) {
    return block_to_slot[index(layer, head) * static_cast<std::size_t>(kv.max_blocks) +
                         static_cast<std::size_t>(block)];
  }
  void place(int layer, int head, int block, int in_slot) {
    slot(layer, head, block) = in_slot;
    slot_to_block[index(layer, head) * static_cast<std::size_t>(kv.num_slots) +
                  static_cast<std::size_t>(in_slot)] = block;
  }
  void upload() {
    device_block_to_slot.set(block_to_slot);
    device_slot_to_block.set(slot_to_block);
  }
  void download() {
    block_to_slot = device_block_to_slot.get();
    slot_to_block = device_slot_to_block.get();
  }

  std::byte* slab(int head, int block) {
    return arena.host().data() + slab_index(head, block) * kv.shape.slab_bytes();
  }
  std::byte* arena_block(int layer, int head, int block) {
    return slab(head, block) + slab_block_offset(kv.shape, layer, block);
  }
  // A block that isn't in host memory, for all that ops can see.
  void remove_slab(int head, int block) {
    std::vector<std::byte*> addresses = slabs.get();
    addresses[slab_index(head, block)] = nullptr;
    slabs.set(addresses);
  }

  const SequenceKv& with_mismatches() {
    kv.mismatches = mismatches.data();
    return kv;
  }
  std::size_t num_slabs(const KvShape& shape) const {
    return static_cast<std::size_t>(shape.num_kv_heads) * static_cast<std::size_t>(num_segments);
  }
  std::vector<std::byte*> slab_addresses(const KvShape& shape) const {
    std::vector<std::byte*> addresses;
    for (std::size_t i = 0; i < num_slabs(shape); ++i) {
      addresses.push_back(arena.address() + i * shape.slab_bytes());
    }
    return addresses;
  }
  std::size_t slab_index(int head, int block) const {
    return static_cast<std::size_t>(head * num_segments + block / kSegmentBlocks);
  }
  std::size_t index(int layer, int head) const {
    return static_cast<std::size_t>(layer * kv.shape.num_kv_heads + head);
  }

  std::size_t num_heads;  // of all layers
  int num_segments;
  TestArena arena;
  std::vector<std::int32_t> block_to_slot;  // host
  std::vector<std::int32_t> slot_to_block;
  DeviceArray<std::byte> slots;
  DeviceArray<std::int32_t> device_block_to_slot;
  DeviceArray<std::int32_t> device_slot_to_block;
  DeviceArray<std::byte*> slabs;
  DeviceArray<std::int32_t> length;
  DeviceArray<std::uint32_t> mismatches;
  SequenceKv kv;  // host; what `view` holds on the device
  DeviceArray<SequenceKv> view;
};

inline std::size_t entries_of(const KvShape& shape, int width) {
  return static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads) *
         static_cast<std::size_t>(width);
}

struct DeviceSelection {
  DeviceSelection(DeviceUnderTest& on, const KvShape& shape, int max_selected)
      : blocks(on, std::vector<std::int32_t>(entries_of(shape, max_selected))),
        counts(on, std::vector<std::int32_t>(entries_of(shape, 1))),
        selection{blocks.data(), counts.data(), max_selected},
        view(on, {selection}) {}

  // The chosen blocks alone, of each (layer, head): what lies past them is undefined.
  std::vector<std::vector<std::int32_t>> chosen() const {
    const auto all = blocks.get();
    std::vector<std::vector<std::int32_t>> found;
    for (const std::int32_t count : counts.get()) {
      const auto first =
          all.begin() + static_cast<std::ptrdiff_t>(found.size()) * selection.max_selected;
      found.emplace_back(first, first + count);
    }
    return found;
  }

  DeviceArray<std::int32_t> blocks;
  DeviceArray<std::int32_t> counts;
  Selection selection;
  DeviceArray<Selection> view;
};

struct DeviceFetches {
  DeviceFetches(DeviceUnderTest& on, const KvShape& shape, int max_entries)
      : entries(on, std::vector<FetchEntry>(entries_of(shape, max_entries))),
        counts(on, std::vector<std::int32_t>(entries_of(shape, 1))),
        totals(on, {0, 0}),
        list{entries.data(), counts.data(), max_entries, totals.data()},
        view(on, {list}) {}

  using Entries = std::vector<std::pair<int, int>>;  // block, slot
  std::vector<Entries> listed() const {
    const std::vector<FetchEntry> all = entries.get();
    std::vector<Entries> found;
    for (const std::int32_t count : counts.get()) {
      const auto first = found.size() * static_cast<std::size_t>(list.max_entries);
      found.emplace_back();
      for (std::size_t i = first; i < first + static_cast<std::size_t>(count); ++i) {
        found.back().emplace_back(all[i].block, all[i].slot);
      }
    }
    return found;
  }

  DeviceArray<FetchEntry> entries;
  DeviceArray<std::int32_t> counts;
  DeviceArray<std::uint64_t> totals;
  FetchList list;
  DeviceArray<FetchList> view;
};

}  // namespace foretoken::kernels
