// A whole NVMe file of a few slots is opened. Its sectors are such as a checksum bears out, which
// no fuzzer would find: of any numbers, keys and chains, in a circle too; some are damaged, or not
// there. Each slab is found once, in a slot of its own, and again by the next opening.
#include <sys/eventfd.h>

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "common/log.h"
#include "kvstore/internal/file_descriptor.h"
#include "kvstore/internal/nvme_contents.h"
#include "kvstore/internal/nvme_index.h"
#include "tests/fuzz/nvme_sectors.h"
#include "tests/kvstore/test_slab.h"

namespace {

using namespace foretoken::kvstore;

constexpr std::uint32_t kSlots = 6;
constexpr std::size_t kSectors = 2 + kSlots;
constexpr std::uint64_t kFileId = 7;

const NvmeGeometry& geometry() {
  static const NvmeGeometry kGeometry{slot_bytes(kTestModel.slab_shape(), /*is_sealed=*/false),
                                      kSlots};
  return kGeometry;
}

// The file's superblocks and headers; nobody asks for its slabs.
class SectorDevice : public BlockDevice {
 public:
  std::span<std::byte, kSectorBytes> sector(std::size_t index) {
    return std::span(sectors_).subspan(index * kSectorBytes).first<kSectorBytes>();
  }
  void submit(const IoOperation& operation) override {
    FT_CHECK(operation.offset + operation.bytes <= sectors_.size(), operation.offset);
    std::byte* there = sectors_.data() + operation.offset;
    if (operation.direction == IoDirection::kWrite) {
      std::memcpy(there, operation.data, operation.bytes);
    } else {
      std::memcpy(operation.data, there, operation.bytes);
    }
    ended_.push_back({operation.tag, operation.bytes});
  }
  std::vector<IoDone> completed() override { return std::exchange(ended_, {}); }
  foretoken::Status resize(std::uint64_t bytes) override {
    bytes_ = bytes;
    return foretoken::Ok{};
  }
  foretoken::Result<std::uint64_t> size() const override { return bytes_; }
  int completion_fd() const override { return readable_.get(); }
  std::string_view name() const override { return "sectors"; }

 private:
  std::vector<std::byte> sectors_ = std::vector<std::byte>(kSectors * kSectorBytes);
  std::uint64_t bytes_ = geometry().file_bytes();
  std::vector<IoDone> ended_;
  FileDescriptor readable_{eventfd(1, EFD_CLOEXEC)};  // all that was submitted has ended
};

// What the fuzzer says, a byte at a time; zeros when it has said all.
class Words {
 public:
  explicit Words(std::span<const std::uint8_t> data) : data_(data) {}
  std::uint8_t next() {
    if (data_.empty()) return 0;
    const std::uint8_t value = data_.front();
    data_ = data_.subspan(1);
    return value;
  }
  std::uint64_t next_number() {
    const std::uint64_t value = next();
    return value << next() % 64;
  }
  foretoken::PrefixKey next_key() { return test_name(0, next() % (2 * kSlots)).key; }

 private:
  std::span<const std::uint8_t> data_;
};

SlotHeader header_of(std::uint32_t slot, Words& words) {
  SlotHeader header;
  header.slot = SlotIndex{slot};
  header.file_id = kFileId;
  header.generation = words.next_number();
  header.number = words.next_number();
  header.name.head = words.next() % kTestModel.total_kv_heads;
  header.name.key = words.next_key();
  if (words.next() % 4 != 0) header.previous = words.next_key();
  return header;
}

// The sector may also be damaged in one byte.
void write(const auto& what, Sector sector, Words& words) {
  encode(what, sector);
  if (words.next() % 8 != 7) return;
  const std::size_t at = words.next();
  sector[at] ^= std::byte{words.next()};
}

void write_file(SectorDevice& device, Words& words) {
  for (int copy = 0; copy < 2; ++copy) {
    const std::uint64_t generation = words.next_number();
    write(Superblock{generation, kFileId, kTestModel, geometry(), std::nullopt},
          device.sector(static_cast<std::size_t>(copy)), words);
  }
  for (std::uint32_t slot = 0; slot < kSlots; ++slot) {
    if (words.next() % 8 != 7) write(header_of(slot, words), device.sector(2 + slot), words);
  }
}

NvmeContents open(SectorDevice& device, std::span<std::byte> memory) {
  const NvmeOpening opening{kTestModel, geometry().file_bytes(), 0, NvmeReuse::kKeepSlabs};
  NvmeContents contents = open_contents(device, memory, opening).value_or_throw();
  NvmeIndex(kSlots, contents.slabs, contents.unreadable).check();
  for (const SlotHeader& slab : contents.slabs) FT_CHECK(slab.number <= contents.last_number);
  return contents;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  foretoken::log().set_level(spdlog::level::off);  // damage is logged
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const IoMemory memory(kSectors * kSectorBytes);
  SectorDevice device;
  Words words({data, size});
  write_file(device, words);
  const NvmeContents first = open(device, memory.bytes());
  if (size % 4 != 0) return 0;  // one opening takes half the time
  const NvmeContents second = open(device, memory.bytes());
  FT_CHECK(second.slabs == first.slabs);
  FT_CHECK(second.superblock.generation == first.superblock.generation + 1);
  return 0;
}
