// SlotTable: what stands behind the runs of a slab in its slot of the NVMe file: the checksums of
// its blocks, and where the file is encrypted the seals of its runs. Who reads runs alone
// (kvstore/outsized_kv.h) needs it first.
//
// Example: tests/kvstore/nvme_store_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "common/result.h"
#include "kernels/kv_layout.h"
#include "kvstore/internal/nvme_format.h"
#include "kvstore/internal/run_io.h"

namespace foretoken::kvstore {

struct SlotTable {
  SlotTable(const kernels::KvShape& shape, bool is_sealed);

  std::vector<std::uint64_t> checksums;  // [num_layers, 16]
  std::vector<Seal> seals;               // [num_layers], or none
  std::size_t seals_at;                  // in its bytes on disk

  std::span<std::uint64_t> checksums_of(int layer);
  std::span<const std::uint64_t> checksums_of(int layer) const;
  std::uint64_t digest() const;  // what the slot's header binds

  // On disk: whole sectors.
  static std::size_t bytes(const kernels::KvShape& shape, bool is_sealed);
  // REQUIRES: as many bytes.
  void encode(std::span<std::byte> to) const;
  void decode(std::span<const std::byte> from);
};

// A slot that is said to hold this slab.
struct NamedSlot {
  SlotIndex slot{};
  SlabName name;
};
struct SlotFile {
  kernels::KvShape shape;
  std::uint64_t slots_offset = 0;  // of slot 0's slab
  std::uint64_t file_id = 0;
  const KvCipher* cipher = nullptr;  // RunIo's device's too; null: the file is not encrypted

  std::uint64_t slab_offset(SlotIndex slot) const;
};
// Reads header and table of each, in this order. Waits for the disk, RunIo::kStallLimit at most
// without an end. Errors, which are counted: kCorrupt: they don't hold what is said; RunIo's;
// kUnavailable: the disk failed before.
std::vector<Result<SlotTable>> read_tables(RunIo& io, const SlotFile& file,
                                           std::span<const NamedSlot> slots);
// Whether a read that ended so says that the slot does not hold its slab. Else it says that the
// disk does not answer, and the slab may be as it should.
bool refutes_slot(const Error& error);

}  // namespace foretoken::kvstore
