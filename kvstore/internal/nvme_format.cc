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
constexpr std::uint64_t kMaxNumber = std::uint64_t{1} << 63;  // no store writes so many slabs

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
  // Without a segment before, the checksum stands here.
  std::array<std::uint8_t, 32> previous{};
  std::uint64_t checksum = 0;
};
static_assert(sizeof(DiskHeader) == 128 && offsetof(DiskHeader, previous) == 88);

// Of an encrypted file: the same superblock, and behind it the proof that the key is the file's.
struct DiskSealedSuperblock {
  DiskSuperblock plain;
  std::uint32_t cipher = 0;
  std::uint32_t zero = 0;
  Seal seal;  // of nothing, at the bytes before
};
static_assert(sizeof(DiskSealedSuperblock) == 248 && offsetof(DiskSealedSuperblock, seal) == 208);

// What a header says of its slab.
struct DiskSlab {
  std::uint64_t generation = 0;
  std::uint64_t number = 0;
  std::uint64_t digest = 0;
  std::uint64_t head = 0;
  std::array<std::uint8_t, 32> key{};
  Seal seal;
  std::array<std::uint8_t, 32> previous{};  // not sealed where there is no segment before
};
struct DiskSealedHeader {
  std::array<char, 8> magic = kHeaderMagic;
  std::uint32_t version = kSealedNvmeVersion;
  std::uint32_t slot = 0;
  std::uint64_t file_id = 0;
  Seal seal;  // of `slab`, at the bytes before
  DiskSlab slab;
};
static_assert(sizeof(DiskSealedHeader) == 200 && offsetof(DiskSealedHeader, slab) == 64);

// The bytes of a sector's struct that stand before its seal.
template <typename Disk>
std::span<const std::byte> place_of(const Disk& disk) {
  return std::as_bytes(std::span(&disk, 1)).first(offsetof(Disk, seal));
}

std::uint64_t checksum_of(const DiskSuperblock& disk) {
  return XXH3_64bits(&disk, offsetof(DiskSuperblock, checksum));
}

template <typename Disk>
void write_sector(const Disk& disk, Sector sector) {
  static_assert(std::is_trivially_copyable_v<Disk>);
  std::memset(sector.data(), 0, sector.size());
  std::memcpy(sector.data(), &disk, sizeof disk);
}

template <typename Disk>
Disk from_sector(ConstSector sector) {
  Disk disk;
  std::memcpy(&disk, sector.data(), sizeof disk);
  return disk;
}

Error corrupt(const char* sector, const char* why) {
  return {ErrorCode::kCorrupt, std::string("NVMe file: ") + sector + " " + why};
}

template <typename Disk>
Status check_version(const Disk& disk, std::uint32_t version, const char* name) {
  if (disk.magic != Disk{}.magic) return corrupt(name, "has no magic");
  if (disk.version != version) return corrupt(name, "is of another version");
  return Ok{};
}

bool is_count(std::uint32_t value) { return value >= 1 && value <= kMaxCount; }

bool is_kv_type(std::uint32_t value) {
  return value == static_cast<std::uint32_t>(kernels::DataType::kFp16) ||
         value == static_cast<std::uint32_t>(kernels::DataType::kBf16);
}

}  // namespace

std::size_t slot_bytes(const kernels::KvShape& slab, bool is_sealed) {
  const std::size_t seals =
      is_sealed ? static_cast<std::size_t>(slab.num_layers) * sizeof(Seal) : 0;
  return slab.slab_bytes() + (seals + kSectorBytes - 1) / kSectorBytes * kSectorBytes;
}

NvmeGeometry NvmeGeometry::fit(std::uint64_t capacity_bytes, std::size_t slot_bytes) {
  FT_CHECK(slot_bytes > 0 && slot_bytes % kSectorBytes == 0, slot_bytes);
  const std::uint64_t superblocks = 2 * kSectorBytes;
  if (capacity_bytes < superblocks) return {slot_bytes, 0};
  const std::uint64_t slots = (capacity_bytes - superblocks) / (slot_bytes + kSectorBytes);
  return {slot_bytes, static_cast<std::uint32_t>(std::min<std::uint64_t>(slots, UINT32_MAX - 1))};
}

void encode(const Superblock& superblock, Sector sector, const KvCipher* cipher) {
  const ModelIdentity& model = superblock.model;
  FT_CHECK(model.model_hash.size() <= kMaxModelHashBytes, model.model_hash.size());
  DiskSuperblock disk;
  disk.num_slots = superblock.geometry.num_slots;
  disk.total_kv_heads = static_cast<std::uint32_t>(model.total_kv_heads);
  disk.num_layers = static_cast<std::uint32_t>(model.num_layers);
  disk.head_dim = static_cast<std::uint32_t>(model.head_dim);
  disk.kv_type = static_cast<std::uint32_t>(model.kv_type);
  disk.slab_bytes = model.slab_bytes();
  disk.generation = superblock.generation;
  disk.file_id = superblock.file_id;
  disk.model_hash_bytes = model.model_hash.size();
  std::ranges::copy(model.model_hash, disk.model_hash.begin());
  if (cipher != nullptr) {
    disk.version = superblock.is_old ? kOldSealedNvmeVersion : kSealedNvmeVersion;
  }
  disk.checksum = checksum_of(disk);
  FT_CHECK(superblock.cipher.has_value() == (cipher != nullptr));
  if (cipher == nullptr) return write_sector(disk, sector);
  DiskSealedSuperblock sealed{disk, static_cast<std::uint32_t>(*superblock.cipher), 0, {}};
  sealed.seal = cipher->seal({}, place_of(sealed));
  write_sector(sealed, sector);
}

namespace {

Error not_our_key(const std::string& why) {
  return {ErrorCode::kConfig, "the NVMe file is encrypted" + why};
}

// The superblock's checksum is right. Its cipher, if the key is the file's.
Result<CipherKind> prove(const DiskSealedSuperblock& sealed, const KvCipher* cipher) {
  if (cipher == nullptr) {
    return not_our_key(": it takes --kv-encrypt and its key, --kv-key-file; or remove it");
  }
  if (sealed.cipher != static_cast<std::uint32_t>(cipher->kind())) {
    return not_our_key(" otherwise than this CPU does, with " +
                       std::string(cipher_name(cipher->kind())) + ": remove it");
  }
  if (!cipher->open({}, place_of(sealed), sealed.seal)) {
    return not_our_key(" with another key than --kv-key-file's, or was changed");
  }
  return cipher->kind();
}

}  // namespace

Result<Superblock> decode_superblock(ConstSector sector, const KvCipher* cipher) {
  constexpr auto kName = "superblock";
  const auto disk = from_sector<DiskSuperblock>(sector);
  const std::uint32_t version = disk.version;
  const bool is_old = version == kOldSealedNvmeVersion;
  const bool is_sealed = is_old || version == kSealedNvmeVersion;
  FT_RETURN_IF_ERROR(check_version(disk, is_sealed ? version : kNvmeVersion, kName));
  if (disk.checksum != checksum_of(disk)) return corrupt(kName, "has a wrong checksum");
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
  superblock.geometry = {slot_bytes(superblock.model.slab_shape(), is_sealed && !is_old),
                         disk.num_slots};
  superblock.is_old = is_old;
  if (disk.slab_bytes != superblock.model.slab_bytes()) {
    return corrupt(kName, "lays slabs out otherwise");
  }
  if (disk.num_slots == 0 || disk.num_slots == UINT32_MAX) return corrupt(kName, "has no slots");
  if (is_sealed) {
    FT_ASSIGN_OR_RETURN(superblock.cipher,
                        prove(from_sector<DiskSealedSuperblock>(sector), cipher));
  }
  return superblock;
}

namespace {

constexpr auto kHeaderName = "slot header";

// What the checksum stands behind.
constexpr std::size_t proven_bytes(bool is_chained) {
  return is_chained ? offsetof(DiskHeader, checksum) : offsetof(DiskHeader, previous);
}

std::span<std::byte> sealed_bytes(DiskSlab& slab, bool is_chained) {
  return std::as_writable_bytes(std::span(&slab, 1))
      .first(is_chained ? sizeof slab : offsetof(DiskSlab, previous));
}

void encode_plain(const SlotHeader& header, Sector sector) {
  DiskHeader disk;
  if (header.previous) {
    disk.version = kChainedVersion;
    disk.previous = header.previous->bytes;
  }
  disk.slot = raw(header.slot);
  disk.file_id = header.file_id;
  disk.generation = header.generation;
  disk.number = header.number;
  disk.digest = header.digest;
  disk.head = static_cast<std::uint64_t>(header.name.head);
  disk.key = header.name.key.bytes;
  write_sector(disk, sector);
  const std::size_t bytes = proven_bytes(header.previous.has_value());
  const std::uint64_t checksum = XXH3_64bits(sector.data(), bytes);
  std::memcpy(sector.data() + bytes, &checksum, sizeof checksum);
}

void encode_sealed(const SlotHeader& header, Sector sector, const KvCipher& cipher) {
  DiskSealedHeader disk;
  disk.slot = raw(header.slot);
  disk.file_id = header.file_id;
  disk.slab.generation = header.generation;
  disk.slab.number = header.number;
  disk.slab.digest = header.digest;
  disk.slab.head = static_cast<std::uint64_t>(header.name.head);
  disk.slab.key = header.name.key.bytes;
  disk.slab.seal = header.seal;
  if (header.previous) {
    disk.version = kSealedChainedVersion;
    disk.slab.previous = header.previous->bytes;
  }
  disk.seal = cipher.seal(sealed_bytes(disk.slab, header.previous.has_value()), place_of(disk));
  write_sector(disk, sector);
}

Result<SlotHeader> header_of(std::uint32_t slot, std::uint64_t file_id, const DiskSlab& slab,
                             bool is_chained) {
  if (slab.head >= kMaxCount) return corrupt(kHeaderName, "has a KV head out of range");
  if (slab.number > kMaxNumber) return corrupt(kHeaderName, "has a number out of range");
  SlotHeader header{SlotIndex{slot}, file_id,
                    slab.generation, slab.number,
                    slab.digest,     {static_cast<int>(slab.head), PrefixKey{slab.key}},
                    slab.seal};
  if (is_chained) header.previous = PrefixKey{slab.previous};
  return header;
}

Result<SlotHeader> decode_plain(ConstSector sector) {
  const auto disk = from_sector<DiskHeader>(sector);
  const bool is_chained = disk.version == kChainedVersion;
  FT_RETURN_IF_ERROR(check_version(disk, is_chained ? kChainedVersion : kNvmeVersion, kHeaderName));
  std::uint64_t due = 0;
  std::memcpy(&due, sector.data() + proven_bytes(is_chained), sizeof due);
  if (XXH3_64bits(sector.data(), proven_bytes(is_chained)) != due) {
    return corrupt(kHeaderName, "has a wrong checksum");
  }
  return header_of(
      disk.slot, disk.file_id,
      {disk.generation, disk.number, disk.digest, disk.head, disk.key, {}, disk.previous},
      is_chained);
}

Result<SlotHeader> decode_sealed(ConstSector sector, const KvCipher& cipher) {
  auto disk = from_sector<DiskSealedHeader>(sector);
  const bool is_chained = disk.version == kSealedChainedVersion;
  FT_RETURN_IF_ERROR(
      check_version(disk, is_chained ? kSealedChainedVersion : kSealedNvmeVersion, kHeaderName));
  if (!cipher.open(sealed_bytes(disk.slab, is_chained), place_of(disk), disk.seal)) {
    return corrupt(kHeaderName, "does not open");
  }
  return header_of(disk.slot, disk.file_id, disk.slab, is_chained);
}

}  // namespace

void encode(const SlotHeader& header, Sector sector, const KvCipher* cipher) {
  if (cipher != nullptr) return encode_sealed(header, sector, *cipher);
  encode_plain(header, sector);
}

Result<std::optional<SlotHeader>> decode_slot_header(ConstSector sector, SlotIndex slot,
                                                     std::uint64_t file_id,
                                                     const KvCipher* cipher) {
  if (std::ranges::all_of(sector, [](std::byte byte) { return byte == std::byte{0}; })) {
    return std::optional<SlotHeader>();
  }
  FT_ASSIGN_OR_RETURN(const SlotHeader header,
                      cipher == nullptr ? decode_plain(sector) : decode_sealed(sector, *cipher));
  if (header.slot != slot) return corrupt(kHeaderName, "is of another slot");
  if (header.file_id != file_id) return corrupt(kHeaderName, "is of another file");
  return std::optional(header);
}

std::uint64_t slab_digest(std::span<const std::byte> checksums) {
  return XXH3_64bits(checksums.data(), checksums.size());
}

}  // namespace foretoken::kvstore
