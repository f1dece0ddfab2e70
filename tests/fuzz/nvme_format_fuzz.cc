// Anything as a sector of the NVMe file: refused or read whole; what is read is written the same.
// A second time with a checksum that fits, which no fuzzer would find.
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "kvstore/internal/nvme_format.h"

namespace {

using namespace foretoken::kvstore;

constexpr SlotIndex kSlot{3};
constexpr std::uint64_t kFileId = 7;
constexpr std::size_t kSuperblockBytes = 192;
constexpr std::size_t kHeaderBytes = 88;

void decode_both(ConstSector sector) {
  std::array<std::byte, kSectorBytes> written{};
  if (const auto superblock = decode_superblock(sector)) {
    encode(*superblock, written);
    const auto again = decode_superblock(written);
    FT_CHECK(again.has_value() && *again == *superblock);
  }
  const auto header = decode_slot_header(sector, kSlot, kFileId);
  if (header && *header) {
    encode(**header, written);
    const auto again = decode_slot_header(written, kSlot, kFileId);
    FT_CHECK(again.has_value() && *again == *header);
  }
}

void seal(Sector sector, std::size_t bytes) {
  const std::uint64_t checksum = XXH3_64bits(sector.data(), bytes);
  std::memcpy(sector.data() + bytes, &checksum, sizeof checksum);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::array<std::byte, kSectorBytes> sector{};
  std::memcpy(sector.data(), data, std::min(size, sector.size()));
  decode_both(sector);
  seal(sector, kSuperblockBytes);
  decode_both(sector);
  seal(sector, kHeaderBytes);
  decode_both(sector);
  return 0;
}
