// What the NVMe file of KV slabs holds: its layout, and its two kinds of sectors
// (docs/formats.md, "NVMe file", says it byte by byte).
//
//   sector 0, 1     the superblock, twice: the valid one of the higher generation counts
//   sector 2 + i    header of slot i, so that all headers are one stretch of the file
//   then            slabs, slot by slot, as they lie in the arena; in an encrypted file behind each
//                   the seals of its runs (sealed_slab.h)
//
// A sector proves itself: magic, version, the slot it was written for, and XXH3-64 over all that.
// In an encrypted file the key proves them, and what a header says of its slab is sealed.
// Decoding trusts nothing and never throws. Error: kCorrupt, naming the field.
//
// Pure functions; thread-safe. Example: tests/kvstore/nvme_faults_test.cc; fuzzed by
// tests/fuzz/nvme_format_fuzz.cc
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "common/prefix_key.h"
#include "common/result.h"
#include "kvstore/internal/kv_cipher.h"
#include "kvstore/internal/model_identity.h"

namespace foretoken::kvstore {

inline constexpr std::size_t kSectorBytes = 4096;  // what O_DIRECT reads and writes at least
inline constexpr std::uint32_t kNvmeVersion = 1;
inline constexpr std::uint32_t kSealedNvmeVersion = 3;     // of an encrypted file
inline constexpr std::uint32_t kOldSealedNvmeVersion = 2;  // whose slabs were sealed as a whole
// Of headers that name the segment before theirs; others have the file's version.
inline constexpr std::uint32_t kChainedVersion = 4;
inline constexpr std::uint32_t kSealedChainedVersion = 5;

enum class SlotIndex : std::uint32_t {};

// What a slab holds, on any tier: one segment of one KV head.
struct SlabName {
  int head = 0;
  PrefixKey key;
  auto operator<=>(const SlabName&) const = default;
};

// What a slab takes in the file: a multiple of kSectorBytes.
std::size_t slot_bytes(const kernels::KvShape& slab, bool is_sealed);

struct NvmeGeometry {
  std::size_t slot_bytes = 0;
  std::uint32_t num_slots = 0;
  bool operator==(const NvmeGeometry&) const = default;

  // As many slots as a file of capacity_bytes has room for; none if not even one.
  static NvmeGeometry fit(std::uint64_t capacity_bytes, std::size_t slot_bytes);

  static constexpr std::uint64_t superblock_offset(int copy) {
    return kSectorBytes * static_cast<std::uint64_t>(copy);
  }
  std::uint64_t header_offset(SlotIndex slot) const {
    return kSectorBytes * (2 + static_cast<std::uint64_t>(slot));
  }
  std::uint64_t slab_offset(SlotIndex slot) const {
    return kSectorBytes * (2 + std::uint64_t{num_slots}) +
           slot_bytes * static_cast<std::uint64_t>(slot);
  }
  std::uint64_t file_bytes() const { return slab_offset(SlotIndex{num_slots}); }
};

struct Superblock {
  std::uint64_t generation = 0;  // one more at each opening of the file
  std::uint64_t file_id = 0;     // random, of the file's first opening
  ModelIdentity model;
  NvmeGeometry geometry;
  std::optional<CipherKind> cipher;  // of an encrypted file
  bool is_old = false;  // of kOldSealedNvmeVersion: its key is proven, its slots are not read
  bool operator==(const Superblock&) const = default;
};

struct SlotHeader {
  SlotIndex slot{};
  std::uint64_t file_id = 0;
  std::uint64_t generation = 0;  // of the opening that wrote it
  std::uint64_t number = 0;      // rises with each slab that is written, and each use of a prefix
  std::uint64_t digest = 0;      // of the slab's checksums
  SlabName name;
  Seal seal;  // of what stands behind the slab's runs, in an encrypted file
  std::optional<PrefixKey> previous = {};  // of the segment before, on which this one builds
  bool operator==(const SlotHeader&) const = default;
};

using Sector = std::span<std::byte, kSectorBytes>;
using ConstSector = std::span<const std::byte, kSectorBytes>;

// `cipher`: the file's; null of one that is not encrypted. REQUIRES: superblock.cipher is its kind.
void encode(const Superblock& superblock, Sector sector, const KvCipher* cipher = nullptr);
void encode(const SlotHeader& header, Sector sector, const KvCipher* cipher = nullptr);
// Error: kConfig where the file is encrypted, and not with this cipher. A cipher takes also the
// superblock of a file that is not encrypted.
Result<Superblock> decode_superblock(ConstSector sector, const KvCipher* cipher = nullptr);
// nullopt: the sector is all zeros, as of a slot that was never written.
// Error: also where the header is of another slot or of another file.
Result<std::optional<SlotHeader>> decode_slot_header(ConstSector sector, SlotIndex slot,
                                                     std::uint64_t file_id,
                                                     const KvCipher* cipher = nullptr);

// Of a slab's checksums, [num_layers, 16] uint64: what binds a header to the bytes of its slab.
std::uint64_t slab_digest(std::span<const std::byte> checksums);

}  // namespace foretoken::kvstore

// The key is a hash already.
template <>
struct std::hash<foretoken::kvstore::SlabName> {
  std::size_t operator()(const foretoken::kvstore::SlabName& name) const noexcept {
    return std::hash<foretoken::PrefixKey>()(name.key) + static_cast<std::size_t>(name.head);
  }
};
