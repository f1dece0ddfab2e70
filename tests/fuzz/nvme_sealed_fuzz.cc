// Anything as a sector of an encrypted NVMe file, as it comes and sealed with the key that opens
// it, which no fuzzer would find. A target of its own: sealing takes most of the time.
#include "tests/fuzz/nvme_sectors.h"

namespace {

using namespace foretoken::kvstore;

// Where docs/formats.md has the seals: at 208 of a superblock, of nothing; at 24 of a header, of
// bytes 64 to 167, or 199 where it names a segment before.
void seal_both(Sector sector, const KvCipher& cipher) {
  Seal seal = cipher.seal({}, sector.first(208));
  std::memcpy(sector.data() + 208, &seal, sizeof seal);
  decode_both(sector, &cipher);
  for (const std::size_t bytes : {104, 136}) {
    SectorBytes sealed{};
    std::ranges::copy(sector, sealed.begin());
    seal = cipher.seal(std::span(sealed).subspan(64, bytes), std::span(sealed).first(24));
    std::memcpy(sealed.data() + 24, &seal, sizeof seal);
    decode_both(sealed, &cipher);
  }
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
