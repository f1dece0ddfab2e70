// Anything as a sector of an NVMe file that is not encrypted, as it comes and with a checksum that
// fits, which no fuzzer would find.
#include "tests/fuzz/nvme_sectors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace foretoken::kvstore;
  SectorBytes sector = sector_of(data, size);
  decode_both(sector);
  write_checksum(sector, kSuperblockBytes);
  decode_both(sector);
  write_checksum(sector, kChainedHeaderBytes);
  decode_both(sector);
  write_checksum(sector, kHeaderBytes);
  decode_both(sector);
  return 0;
}
