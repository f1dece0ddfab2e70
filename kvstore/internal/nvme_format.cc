#include "kvstore/internal/nvme_format.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/ids.h"

namespace foretoken::kvstore {
namespace {

constexpr std::array<char, 8> kSuperblockMagic = {'F', 'T', 'K', 'V', 'F', 'I', 'L', 'E'};
constexpr std::array<char, 8> kHeaderMagic = {'F', 'T', 'K', 'V', 'S', 'L', 'A', 'B'};
constexpr std::uint32_t kMaxCount = 1'024;  // heads, layers, head_dim: as the store's protocol

// The sectors as they lie on disk (little-endian); zeros follow up to kSectorBytes.
struct DiskSuperblock {
  std::array<char, 8> magic = kSuperblockMagic;
  std::uint32_t version = kNvmeVersion;
  std::uint32_t num_slots = 0;
  std::uint32_t total_kv_heads = 0;
  std::uint32_t num_layers = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t kv_type = 0;
  std::uint64_t slab_bytes = 0;
  std::uint64_t generation = 0;
  std::uint64_t file_id = 0;
  std::uint64_t model_hash_bytes = 0;
  std::array<char, kMaxModelHashBytes> model_hash{};
  std::uint64_t checksum = 0;
};
static_assert(sizeof(DiskSuperblock) == 200 && offsetof(DiskSuperblock, slab_bytes) == 32);

struct DiskHeader {
  std::array<char, 8> magic = kHeaderMagic;
  std::uint32_t version = kNvmeVersion;
  std::uint32_t slot = 0;
  std::uint64_t file_id = 0;
  std::uint64_t generation = 0;
  std::uint64_t number = 0;
  std::uint64_t digest = 0;
  std::uint64_t head = 0;
  std::array<std::uint8_t, 32> key{};
  std::uint64_t checksum = 0;
};
static_assert(sizeof(DiskHeader) == 96 && offsetof(DiskHeader, key) == 56);

template <typename Disk>
std::uint64_t checksum_of(const Disk& disk) {
  return XXH3_64bits(&disk, offsetof(Disk, checksum));
}

template <typename Disk>
void write_sector(Disk disk, Sector sector) {
  static_assert(std::is_trivially_copyable_v<Disk>);
  disk.checksum = checksum_of(disk);
  std::ranges::fill(sector, std::byte{0});
  std::memcpy(sector.data(), &disk, sizeof disk);
}

Error corrupt(const char* sector, const char* why) {
  return {ErrorCode::kCorrupt, std::string("NVMe file: ") + sector + " " + why};
}

// What both kinds of sectors have in common.
template <typename Disk>
Result<Disk> read_sector(ConstSector sector, const char* name) {
  Disk disk;
  std::memcpy(&disk, sector.data(), sizeof disk);
  if (disk.magic != Disk{}.magic) return corrupt(name, "has no magic");
  if (disk.version != kNvmeVersion) return corrupt(name, "is of another version");
  if (disk.checksum != checksum_of(disk)) return corrupt(name, "has a wrong checksum");
  return disk;
}

bool is_count(std::uint32_t value) { return value >= 1 && value <= kMaxCount; }

bool is_kv_type(std::uint32_t value) {
  return value == static_cast<std::uint32_t>(kernels::DataType::kFp16) ||
         value == static_cast<std::uint32_t>(kernels::DataType::kBf16);
}

}  // namespace

NvmeGeometry NvmeGeometry::fit(std::uint64_t capacity_bytes, std::size_t slab_bytes) {
  FT_CHECK(slab_bytes > 0 && slab_bytes % kSectorBytes == 0, slab_bytes);
  const std::uint64_t superblocks = 2 * kSectorBytes;
  if (capacity_bytes < superblocks) return {slab_bytes, 0};
  const std::uint64_t slots = (capacity_bytes - superblocks) / (slab_bytes + kSectorBytes);
  return {slab_bytes, static_cast<std::uint32_t>(std::min<std::uint64_t>(slots, UINT32_MAX - 1))};
}

void encode(const Superblock& superblock, Sector sector) {
  const ModelIdentity& model = superblock.model;
  FT_CHECK(model.model_hash.size() <= kMaxModelHashBytes, model.model_hash.size());
  DiskSuperblock disk;
  disk.num_slots = superblock.geometry.num_slots;
  disk.total_kv_heads = static_cast<std::uint32_t>(model.total_kv_heads);
  disk.num_layers = static_cast<std::uint32_t>(model.num_layers);
  disk.head_dim = static_cast<std::uint32_t>(model.head_dim);
  disk.kv_type = static_cast<std::uint32_t>(model.kv_type);
  disk.slab_bytes = superblock.geometry.slab_bytes;
  disk.generation = superblock.generation;
  disk.file_id = superblock.file_id;
  disk.model_hash_bytes = model.model_hash.size();
  std::ranges::copy(model.model_hash, disk.model_hash.begin());
  write_sector(disk, sector);
}

Result<Superblock> decode_superblock(ConstSector sector) {
  constexpr auto kName = "superblock";
  FT_ASSIGN_OR_RETURN(const DiskSuperblock disk, read_sector<DiskSuperblock>(sector, kName));
  if (!is_count(disk.total_kv_heads) || !is_count(disk.num_layers) || !is_count(disk.head_dim)) {
    return corrupt(kName, "has a shape out of range");
  }
  if (!is_kv_type(disk.kv_type)) return corrupt(kName, "has an unknown KV type");
  if (disk.model_hash_bytes > kMaxModelHashBytes) return corrupt(kName, "has a long model hash");
  Superblock superblock;
  superblock.generation = disk.generation;
  superblock.file_id = disk.file_id;
  superblock.model = {std::string(disk.model_hash.data(), disk.model_hash_bytes),
                      static_cast<int>(disk.total_kv_heads), static_cast<int>(disk.num_layers),
                      static_cast<int>(disk.head_dim),
                      static_cast<kernels::DataType>(disk.kv_type)};
  superblock.geometry = {disk.slab_bytes, disk.num_slots};
  if (disk.slab_bytes != superblock.model.slab_bytes()) {
    return corrupt(kName, "lays slabs out otherwise");
  }
  if (disk.num_slots == 0 || disk.num_slots == UINT32_MAX) return corrupt(kName, "has no slots");
  return superblock;
}

void encode(const SlotHeader& header, Sector sector) {
  DiskHeader disk;
  disk.slot = raw(header.slot);
  disk.file_id = header.file_id;
  disk.generation = header.generation;
  disk.number = header.number;
  disk.digest = header.digest;
  disk.head = static_cast<std::uint64_t>(header.name.head);
  disk.key = header.name.key.bytes;
  write_sector(disk, sector);
}

Result<std::optional<SlotHeader>> decode_slot_header(ConstSector sector, SlotIndex slot,
                                                     std::uint64_t file_id) {
  constexpr auto kName = "slot header";
  if (std::ranges::all_of(sector, [](std::byte byte) { return byte == std::byte{0}; })) {
    return std::optional<SlotHeader>();
  }
  FT_ASSIGN_OR_RETURN(const DiskHeader disk, read_sector<DiskHeader>(sector, kName));
  if (disk.slot != raw(slot)) return corrupt(kName, "is of another slot");
  if (disk.file_id != file_id) return corrupt(kName, "is of another file");
  if (disk.head >= kMaxCount) return corrupt(kName, "has a KV head out of range");
  SlotHeader header{slot,        disk.file_id, disk.generation,
                    disk.number, disk.digest,  {static_cast<int>(disk.head), PrefixKey{disk.key}}};
  return std::optional(header);
}

std::uint64_t slab_digest(std::span<const std::byte> checksums) {
  return XXH3_64bits(checksums.data(), checksums.size());
}

}  // namespace foretoken::kvstore
