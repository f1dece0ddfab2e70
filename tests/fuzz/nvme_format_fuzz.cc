// Anything as a sector of the NVMe file: refused or read whole; what is read is written the same.
// A second time with a checksum that fits, and a third time sealed with the key that opens it,
// which no fuzzer would find.
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

void decode_both(ConstSector sector, const KvCipher* cipher = nullptr) {
  std::array<std::byte, kSectorBytes> written{};
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

// Where docs/formats.md has the seals: at 208 of a superblock, of nothing; at 24 of a header, of
// bytes 64 to 167.
void seal_both(Sector sector, const KvCipher& cipher) {
  Seal seal = cipher.seal({}, sector.first(208));
  std::memcpy(sector.data() + 208, &seal, sizeof seal);
  decode_both(sector, &cipher);
  seal = cipher.seal(sector.subspan(64, 104), sector.first(24));
  std::memcpy(sector.data() + 24, &seal, sizeof seal);
  decode_both(sector, &cipher);
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
  static const auto cipher = KvCipher::random();
  std::memcpy(sector.data(), data, std::min(size, sector.size()));
  decode_both(sector, cipher.get());
  seal(sector, kSuperblockBytes);
  seal_both(sector, *cipher);
  return 0;
}
