// What stands in the NVMe file when the store opens it: read back, or laid out anew.
//
// Opening raises the generation and writes both superblocks, one after the other, so that one of
// them is whole at any moment. The index is in no place of its own on disk: it is rebuilt from the
// slots' headers, which one sequential scan reads.
// Example: tests/kvstore/nvme_faults_test.cc
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/nvme_format.h"

namespace foretoken::kvstore {

enum class NvmeReuse { kStartAfresh, kKeepSlabs };

struct NvmeOpening {
  ModelIdentity model;
  std::optional<std::uint64_t> capacity_bytes;  // nullopt: as a kept file has, else default_bytes
  std::uint64_t default_bytes = 0;
  NvmeReuse reuse = NvmeReuse::kStartAfresh;
  std::shared_ptr<const KvCipher> cipher = nullptr;  // null: the file is not encrypted
};

struct NvmeContents {
  Superblock superblock;
  // Each name once, least recently used first, as far as headers tell: what was written last, with
  // all that it builds on, stands last, and of a prefix the end stands first. Before all others
  // stands what builds on a segment that is not there.
  std::vector<SlotHeader> slabs = {};
  std::uint64_t last_number = 0;  // the highest of theirs
  std::int64_t bad_headers = 0;
  std::vector<SlotIndex> unreadable = {};  // slots whose header the disk can't read; in order
};

// kKeepSlabs keeps the file's slabs, where it holds this model's KV and has the size that is asked
// for, and that its superblock says; else the file starts afresh. One that can't be read is left as
// it is, as is one that another key has encrypted. `memory` is used for reading: whole sectors.
// Blocks. Error: kConfig when not one slab fits, or the key is not the file's; kExhausted, kIo,
// kTimeout of the device.
Result<NvmeContents> open_contents(BlockDevice& device, std::span<std::byte> memory,
                                   const NvmeOpening& opening);

// The valid superblock of the higher generation. Error: kCorrupt when there is none; kConfig where
// the cipher is not the file's; kIo, kTimeout.
Result<Superblock> read_superblock(BlockDevice& device, std::span<std::byte> memory,
                                   const KvCipher* cipher = nullptr);
// All headers that are valid. A few that can't be read are left out, and named; more are a disk
// that fails. Error: kIo, kTimeout.
Result<NvmeContents> scan_headers(BlockDevice& device, std::span<std::byte> memory,
                                  const Superblock& superblock, const KvCipher* cipher = nullptr);

}  // namespace foretoken::kvstore
