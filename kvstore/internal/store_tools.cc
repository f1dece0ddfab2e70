#include "kvstore/internal/store_tools.h"

#include <fcntl.h>
#include <poll.h>

#include <chrono>
#include <memory>
#include <set>
#include <vector>

#include "common/ids.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/sealing_device.h"

namespace foretoken::kvstore {
namespace {

using Json = nlohmann::ordered_json;

// A file as it stands: nothing is written to it by looking at it.
class Inspection {
 public:
  explicit Inspection(const ToolTarget& target) : target_(target), file_(existing(target.folder)) {
    const IoMemory memory(std::size_t{1} << 20);
    const auto device = target_.make_device(file_.fd(), memory, /*depth=*/1);
    contents_.superblock =
        read_superblock(*device, memory.bytes(), target_.cipher.get()).value_or_throw();
    if (contents_.superblock.is_old) {
      throw Exception(
          ErrorCode::kConfig,
          "the NVMe file is encrypted as of version 2: the next start lays it out anew");
    }
    contents_ = scan_headers(*device, memory.bytes(), contents_.superblock, cipher().get())
                    .value_or_throw();
    for (const SlotHeader& header : contents_.slabs) held_.insert(header.slot);
  }

  Json report() const {
    const Superblock& superblock = contents_.superblock;
    return {{"model_hash", superblock.model.model_hash},
            {"kv_heads", superblock.model.total_kv_heads},
            {"layers", superblock.model.num_layers},
            {"head_dim", superblock.model.head_dim},
            {"encrypted", superblock.cipher.has_value()},
            {"generation", superblock.generation},
            {"slab_bytes", superblock.model.slab_bytes()},
            {"slabs_total", superblock.geometry.num_slots},
            {"slabs_held", held_.size()},
            {"bad_headers", contents_.bad_headers},
            {"unreadable_headers", contents_.unreadable.size()}};
  }

  // Reads every slab; those that fail are held no longer. How many failed.
  std::int64_t verify() {
    const ModelIdentity& model = contents_.superblock.model;
    IoMemory memory = NvmeTier::make_memory(model);
    auto device = make_sealing_device(
        target_.make_device(file_.fd(), memory, NvmeTier::depth(model)), cipher());
    NvmeTier tier(std::move(memory), std::move(device), contents_, cipher());
    std::vector<std::byte> room(model.slab_bytes());
    std::int64_t failed = 0;
    for (const SlotHeader& header : contents_.slabs) {
      // The tier's own checks, while it is idle, may have come to a slab first, and forgotten it.
      if (tier.knows(header.name)) {
        tier.load(header.name, room.data(), std::chrono::steady_clock::now());
        if (ends_whole(tier)) continue;
        require_disk(tier);
      }
      held_.erase(header.slot);
      ++failed;
    }
    return failed;
  }

  // Takes the bytes of all slots that hold nothing out of the file: their headers are zeros then.
  void collect() const {
    const NvmeGeometry& geometry = contents_.superblock.geometry;
    for (std::uint32_t i = 0; i < geometry.num_slots; ++i) {
      const SlotIndex slot{i};
      if (held_.contains(slot)) continue;
      punch(geometry.header_offset(slot), kSectorBytes);
      punch(geometry.slab_offset(slot), geometry.slot_bytes);
    }
  }
  std::uint64_t allocated_bytes() const { return file_.allocated_bytes(); }

 private:
  // The key may be given for a file that is not encrypted.
  std::shared_ptr<const KvCipher> cipher() const {
    return contents_.superblock.cipher ? target_.cipher : nullptr;
  }
  static const std::filesystem::path& existing(const std::filesystem::path& folder) {
    if (!std::filesystem::exists(folder / "kv-slabs")) {
      throw Exception(ErrorCode::kNotFound, folder.native() + " holds no KV: there is no kv-slabs");
    }
    return folder;
  }
  static bool ends_whole(NvmeTier& tier) {
    for (;;) {
      const auto loaded = tier.advance(std::chrono::steady_clock::now());
      if (!loaded.empty()) return loaded.front().is_whole;
      pollfd ready{tier.completion_fd(), POLLIN, 0};
      if (!tier.has_more()) poll(&ready, 1, 100);
    }
  }
  // A disk that does not work says nothing about what it holds.
  static void require_disk(const NvmeTier& tier) {
    if (tier.stat().state != NvmeState::kOffline) return;
    throw Exception(ErrorCode::kIo,
                    "the disk fails, or does not answer: what it holds can't be told, and nothing "
                    "was changed");
  }
  void punch(std::uint64_t offset, std::uint64_t bytes) const {
    if (fallocate(file_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
      throw Exception(ErrorCode::kIo, "this file system takes no bytes back");
    }
  }

  ToolTarget target_;
  NvmeFile file_;
  NvmeContents contents_;
  std::set<SlotIndex> held_;
};

}  // namespace

Json stat_file(const ToolTarget& target) {
  const Inspection inspection(target);
  Json json = inspection.report();
  json["allocated_bytes"] = inspection.allocated_bytes();
  return json;
}

Json verify_file(const ToolTarget& target) {
  Inspection inspection(target);
  const std::int64_t failed = inspection.verify();
  Json json = inspection.report();
  json["bad_slabs"] = failed;
  return json;
}

Json collect_file(const ToolTarget& target) {
  Inspection inspection(target);
  const std::uint64_t before = inspection.allocated_bytes();
  const std::int64_t failed = inspection.verify();
  inspection.collect();
  Json json = inspection.report();
  json["bad_slabs"] = failed;
  json["freed_bytes"] = before - inspection.allocated_bytes();
  return json;
}

}  // namespace foretoken::kvstore
