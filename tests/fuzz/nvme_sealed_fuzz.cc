// Anything as a sector of an encrypted NVMe file, as it comes and sealed with the key that opens
// it, which no fuzzer would find. A target of its own: sealing takes most of the time.
#include "tests/fuzz/nvme_sectors.h"

namespace {

using namespace foretoken::kvstore;

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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto cipher = KvCipher::random();
  SectorBytes sector = sector_of(data, size);
  decode_both(sector, cipher.get());
  write_checksum(sector, kSuperblockBytes);
  seal_both(sector, *cipher);
  return 0;
}
