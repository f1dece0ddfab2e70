// What the fuzz targets of the NVMe file's sectors share.
#pragma once

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "kvstore/internal/nvme_format.h"

namespace foretoken::kvstore {

// The bytes that a checksum stands behind (docs/formats.md).
inline constexpr std::size_t kSuperblockBytes = 192;
inline constexpr std::size_t kHeaderBytes = 88;
inline constexpr std::size_t kChainedHeaderBytes = 120;

using SectorBytes = std::array<std::byte, kSectorBytes>;

inline SectorBytes sector_of(const std::uint8_t* data, std::size_t size) {
  SectorBytes sector{};
  std::memcpy(sector.data(), data, std::min(size, sector.size()));
  return sector;
}

inline void write_checksum(Sector sector, std::size_t bytes) {
  const std::uint64_t checksum = XXH3_64bits(sector.data(), bytes);
  std::memcpy(sector.data() + bytes, &checksum, sizeof checksum);
}

// As a superblock and as a slot's header: refused or read whole; what is read is written the same.
inline void decode_both(ConstSector sector, const KvCipher* cipher = nullptr) {
  constexpr SlotIndex kSlot{3};
  constexpr std::uint64_t kFileId = 7;
  SectorBytes written{};
  if (const auto superblock = decode_superblock(sector, cipher)) {
    const KvCipher* its = superblock->cipher ? cipher : nullptr;
    encode(*superblock, written, its);
    const auto again = decode_superblock(written, its);
    FT_CHECK(again.has_value() && *again == *superblock);
  }
  const auto header = decode_slot_header(sector, kSlot, kFileId, cipher);
  if (header && *header) {
    encode(**header, written, cipher);
    const auto again = decode_slot_header(written, kSlot, kFileId, cipher);
    FT_CHECK(again.has_value() && *again == *header);
  }
}

}  // namespace foretoken::kvstore
