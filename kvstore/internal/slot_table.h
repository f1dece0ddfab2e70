// SlotTable: what stands behind the runs of a slab in its slot of the NVMe file: the checksums of
// its blocks. Who reads runs alone (kvstore/outsized_kv.h) needs it first.
//
// Example: tests/kvstore/nvme_store_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/kv_layout.h"
#include "kvstore/internal/nvme_format.h"
#include "kvstore/internal/run_io.h"

namespace foretoken::kvstore {

struct SlotTable {
  explicit SlotTable(const kernels::KvShape& shape);

  std::vector<std::uint64_t> checksums;  // [num_layers, 16]

  std::span<std::uint64_t> checksums_of(int layer);
  std::span<const std::uint64_t> checksums_of(int layer) const;
  std::uint64_t digest() const;  // what the slot's header binds

  // On disk: whole sectors.
  static std::size_t bytes(const kernels::KvShape& shape);
  void encode(std::span<std::byte> to) const;
  void decode(std::span<const std::byte> from);
};

// A slot that is said to hold this slab.
struct NamedSlot {
  SlotIndex slot{};
  SlabName name;
};
struct SlotFile {  // not an encrypted one
  kernels::KvShape shape;
  std::uint64_t slots_offset = 0;  // of slot 0's slab
  std::uint64_t file_id = 0;

  std::uint64_t slab_offset(SlotIndex slot) const;
};
// Reads header and table of each, in this order. nullopt: they don't hold what is said, or could
// not be read; it is counted. Waits for the disk, RunIo::kStallLimit at most without an end.
std::vector<std::optional<SlotTable>> read_tables(RunIo& io, const SlotFile& file,
                                                  std::span<const NamedSlot> slots);

}  // namespace foretoken::kvstore
