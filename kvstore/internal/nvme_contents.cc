#include "kvstore/internal/nvme_contents.h"

#include <poll.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "common/check.h"
#include "common/ids.h"
#include "common/log.h"

namespace foretoken::kvstore {
namespace {

constexpr std::chrono::seconds kTimeout{10};  // of one operation while the file is opened
constexpr std::size_t kScanBytes = std::size_t{1} << 20;  // a read of the scan
// Headers that can't be read, of a disk that works otherwise (guessed).
constexpr std::size_t kMostUnreadable = 64;

// The only operation in flight: ends it.
Result<std::size_t> wait_for_one(BlockDevice& device) {
  for (;;) {
    pollfd ready{device.completion_fd(), POLLIN, 0};
    const std::chrono::milliseconds timeout(kTimeout);
    if (poll(&ready, 1, static_cast<int>(timeout.count())) == 0) {
      return Error{ErrorCode::kTimeout, "the disk does not answer"};
    }
    const auto done = device.completed();
    if (!done.empty()) return done.front().bytes;
  }
}

// Moves all of it. A read past the file's end gives zeros.
Status transfer(BlockDevice& device, IoOperation operation) {
  while (operation.bytes > 0) {
    device.submit(operation);
    FT_ASSIGN_OR_RETURN(std::size_t moved, wait_for_one(device));
    moved = moved / kSectorBytes * kSectorBytes;
    if (moved == 0 && operation.direction == IoDirection::kWrite) {
      return Error{ErrorCode::kIo, "the disk wrote nothing"};
    }
    if (moved == 0) {
      std::fill_n(operation.data, operation.bytes, std::byte{0});
      return Ok{};
    }
    operation.offset += moved;
    operation.data += moved;
    operation.bytes -= moved;
  }
  return Ok{};
}

Status write_superblock(BlockDevice& device, std::span<std::byte> memory,
                        const Superblock& superblock, int copy, const KvCipher* cipher) {
  encode(superblock, memory.first<kSectorBytes>(), cipher);
  return transfer(device, {IoDirection::kWrite, NvmeGeometry::superblock_offset(copy),
                           memory.data(), kSectorBytes});
}

// One that lays out another size than the file has is none: its slots may be any number.
Result<Superblock> read_copy(BlockDevice& device, std::span<std::byte> memory, int copy,
                             const KvCipher* cipher) {
  FT_RETURN_IF_ERROR(transfer(device, {IoDirection::kRead, NvmeGeometry::superblock_offset(copy),
                                       memory.data(), kSectorBytes}));
  FT_ASSIGN_OR_RETURN(Superblock superblock,
                      decode_superblock(memory.first<kSectorBytes>(), cipher));
  FT_ASSIGN_OR_RETURN(const std::uint64_t bytes, device.size());
  if (const std::uint64_t due = superblock.geometry.file_bytes(); due != bytes) {
    return Error{ErrorCode::kCorrupt, "NVMe file: it has " + std::to_string(bytes) +
                                          " bytes, and its superblock " + std::to_string(due) +
                                          ", of " + std::to_string(superblock.geometry.num_slots) +
                                          " slots"};
  }
  return superblock;
}

// Odd generations are written to copy 0 first, even ones to copy 1: the copy that is overwritten
// first is never the only whole one.
Status write_superblocks(BlockDevice& device, std::span<std::byte> memory,
                         const Superblock& superblock, const KvCipher* cipher) {
  const int first = superblock.generation % 2 == 1 ? 0 : 1;
  FT_RETURN_IF_ERROR(write_superblock(device, memory, superblock, first, cipher));
  return write_superblock(device, memory, superblock, 1 - first, cipher);
}

std::uint64_t random_id() {
  std::random_device random;
  return (std::uint64_t{random()} << 32) | random();
}

// Of a new file. A rank that loads waits for it, and a disk may be slow or the file very large.
constexpr std::chrono::seconds kMostZeroing{2};

// The headers, as zeros that lie on the disk: a header that is written later finds its place there,
// where a hole would have to be filled first. Past kMostZeroing the others stay holes, which read
// as zeros too.
Status write_empty_headers(BlockDevice& device, std::span<std::byte> memory,
                           const NvmeGeometry& geometry) {
  const std::uint64_t end = geometry.slab_offset(SlotIndex{0});
  const std::span<std::byte> zeros =
      memory.first(std::min(memory.size(), kScanBytes) / kSectorBytes * kSectorBytes);
  std::ranges::fill(zeros, std::byte{0});
  std::uint64_t at = geometry.header_offset(SlotIndex{0});
  const auto deadline = std::chrono::steady_clock::now() + kMostZeroing;
  while (at < end && std::chrono::steady_clock::now() < deadline) {
    const std::size_t bytes = std::min<std::uint64_t>(zeros.size(), end - at);
    FT_RETURN_IF_ERROR(transfer(device, {IoDirection::kWrite, at, zeros.data(), bytes}));
    at += bytes;
  }
  return Ok{};
}

std::optional<CipherKind> cipher_of(const NvmeOpening& opening) {
  if (!opening.cipher) return std::nullopt;
  return opening.cipher->kind();
}

std::size_t slot_bytes_of(const NvmeOpening& opening) {
  return slot_bytes(opening.model.slab_shape(), opening.cipher != nullptr);
}

Result<NvmeContents> start_afresh(BlockDevice& device, std::span<std::byte> memory,
                                  const NvmeOpening& opening) {
  const std::uint64_t capacity = opening.capacity_bytes.value_or(opening.default_bytes);
  const auto geometry = NvmeGeometry::fit(capacity, slot_bytes_of(opening));
  if (geometry.num_slots == 0) {
    return Error{ErrorCode::kConfig, "an NVMe tier of " + std::to_string(capacity) +
                                         " bytes has no room for a slab of " +
                                         std::to_string(geometry.slot_bytes) +
                                         " bytes; give it more (--kv-nvme-gib)"};
  }
  NvmeContents contents;
  contents.superblock = {1, random_id(), opening.model, geometry, cipher_of(opening)};
  FT_RETURN_IF_ERROR(device.resize(0));
  FT_RETURN_IF_ERROR(device.resize(geometry.file_bytes()));
  FT_RETURN_IF_ERROR(write_empty_headers(device, memory, geometry));
  FT_RETURN_IF_ERROR(write_superblocks(device, memory, contents.superblock, opening.cipher.get()));
  return contents;
}

// Why the file's slabs can't be kept; empty: they can.
std::string misfit(const Superblock& found, const NvmeOpening& opening) {
  if (found.cipher != cipher_of(opening)) return "it is not encrypted";
  if (found.is_old) return "its slabs are sealed as a whole, as of version 2";
  if (found.model != opening.model) return "it holds another model's KV";
  if (!opening.capacity_bytes) return "";
  const auto asked = NvmeGeometry::fit(*opening.capacity_bytes, slot_bytes_of(opening));
  return asked == found.geometry ? "" : "it is of another size";
}

void take_header(NvmeContents& contents, ConstSector sector, SlotIndex slot,
                 const KvCipher* cipher) {
  const auto header = decode_slot_header(sector, slot, contents.superblock.file_id, cipher);
  if (!header) {
    ++contents.bad_headers;
  } else if (*header) {
    contents.slabs.push_back(**header);
  }
}

// The headers of slots [first, first + count), in one read.
Status scan_some(BlockDevice& device, std::span<std::byte> memory, const KvCipher* cipher,
                 std::uint64_t first, std::uint64_t count, NvmeContents& contents) {
  const auto slot = [](std::uint64_t index) {
    return SlotIndex{static_cast<std::uint32_t>(index)};
  };
  FT_RETURN_IF_ERROR(
      transfer(device, {IoDirection::kRead, contents.superblock.geometry.header_offset(slot(first)),
                        memory.data(), count * kSectorBytes}));
  for (std::uint64_t i = 0; i < count; ++i) {
    take_header(contents, memory.subspan(i * kSectorBytes).first<kSectorBytes>(), slot(first + i),
                cipher);
  }
  return Ok{};
}

// ... one by one, since some can't be read.
Status scan_each(BlockDevice& device, std::span<std::byte> memory, const KvCipher* cipher,
                 std::uint64_t first, std::uint64_t count, NvmeContents& contents) {
  for (std::uint64_t slot = first; slot < first + count; ++slot) {
    Status scanned = scan_some(device, memory, cipher, slot, 1, contents);
    if (scanned) continue;
    if (scanned.error().code != ErrorCode::kIo || contents.unreadable.size() == kMostUnreadable) {
      return scanned;
    }
    contents.unreadable.push_back(SlotIndex{static_cast<std::uint32_t>(slot)});
  }
  return Ok{};
}

// A slab that was written twice keeps its later place.
void keep_latest(std::vector<SlotHeader>& slabs) {
  std::ranges::sort(slabs, std::greater(), &SlotHeader::number);
  std::map<SlabName, bool> seen;
  std::erase_if(slabs,
                [&](const SlotHeader& header) { return !seen.emplace(header.name, true).second; });
}

// The first head's that has one: headers of an older store name none.
std::optional<PrefixKey> previous_of(std::span<const SlotHeader> segment) {
  const auto named = std::ranges::find_if(
      segment, [](const SlotHeader& header) { return header.previous.has_value(); });
  return named == segment.end() ? std::nullopt : named->previous;
}

// Of slabs that are ordered by their writing, the latest first: what a segment builds on was used
// when it was written, and gives way after it. Without that a segment serves nobody, and gives way
// first.
std::vector<SlotHeader> order_by_use(const std::vector<SlotHeader>& slabs) {
  std::unordered_map<PrefixKey, std::vector<SlotHeader>> segments;  // of all heads
  for (const SlotHeader& header : slabs) segments[header.name.key].push_back(header);
  std::unordered_set<PrefixKey> reached;  // from a prefix's beginning
  std::vector<SlotHeader> latest_first;
  std::vector<SlotHeader> orphans;
  for (const SlotHeader& header : slabs) {
    std::vector<std::vector<SlotHeader>> chain;
    std::optional key = header.name.key;
    while (key) {
      auto segment = segments.extract(*key);  // each once, even if keys went in a circle
      if (!segment) break;
      key = previous_of(segment.mapped());
      chain.push_back(std::move(segment.mapped()));
    }
    const bool is_reached = !key || reached.contains(*key);
    std::vector<SlotHeader>& order = is_reached ? latest_first : orphans;
    std::ranges::reverse(chain);
    for (const auto& segment : chain) {
      if (is_reached) reached.insert(segment.front().name.key);
      order.insert(order.end(), segment.begin(), segment.end());
    }
  }
  latest_first.insert(latest_first.end(), orphans.begin(), orphans.end());
  std::ranges::reverse(latest_first);
  return latest_first;
}

bool is_damage(const Error& error) { return error.code == ErrorCode::kCorrupt; }

}  // namespace

Result<Superblock> read_superblock(BlockDevice& device, std::span<std::byte> memory,
                                   const KvCipher* cipher) {
  auto first = read_copy(device, memory, 0, cipher);
  if (!first && first.error().code == ErrorCode::kTimeout) return first;
  auto second = read_copy(device, memory, 1, cipher);
  if (first && second) return first->generation >= second->generation ? first : second;
  if (first || second) return first ? first : second;
  return is_damage(first.error()) ? second : first;  // what can't be read may be whole
}

Result<NvmeContents> scan_headers(BlockDevice& device, std::span<std::byte> memory,
                                  const Superblock& superblock, const KvCipher* cipher) {
  NvmeContents contents{.superblock = superblock};
  const std::uint64_t end = superblock.geometry.num_slots;
  const std::size_t step = std::min(memory.size(), kScanBytes) / kSectorBytes;
  for (std::uint64_t slot = 0; slot < end; slot += step) {
    const std::uint64_t count = std::min<std::uint64_t>(step, end - slot);
    Status scanned = scan_some(device, memory, cipher, slot, count, contents);
    if (!scanned && scanned.error().code == ErrorCode::kIo) {
      scanned = scan_each(device, memory, cipher, slot, count, contents);
    }
    if (!scanned) return scanned.error();
  }
  keep_latest(contents.slabs);
  if (!contents.slabs.empty()) contents.last_number = contents.slabs.front().number;
  contents.slabs = order_by_use(contents.slabs);
  return contents;
}

Result<NvmeContents> open_contents(BlockDevice& device, std::span<std::byte> memory,
                                   const NvmeOpening& opening) {
  FT_CHECK(memory.size() >= kSectorBytes, memory.size());
  FT_ASSIGN_OR_RETURN(const std::uint64_t bytes, device.size());
  if (opening.reuse == NvmeReuse::kStartAfresh || bytes == 0) {
    return start_afresh(device, memory, opening);
  }
  auto superblock = read_superblock(device, memory, opening.cipher.get());
  // A disk that fails now may still hold all of it; after a timeout `memory` is still the disk's.
  if (!superblock && !is_damage(superblock.error())) {
    return Error{superblock.error().code,
                 "the NVMe file is left as it is: " + superblock.error().message};
  }
  const std::string why = superblock ? misfit(*superblock, opening) : superblock.error().message;
  if (!why.empty()) {
    log().warn("the NVMe file starts afresh: {}", why);
    return start_afresh(device, memory, opening);
  }
  ++superblock->generation;
  FT_RETURN_IF_ERROR(write_superblocks(device, memory, *superblock, opening.cipher.get()));
  return scan_headers(device, memory, *superblock, opening.cipher.get());
}

}  // namespace foretoken::kvstore
