// DyingDevice: passes all on to a disk, and kills its process at a named point of one of its
// writes. Below the sealing device: what it is given is sealed.
//
//   DeathPoint::kTorn: only the first half is on the disk. kEnded: all of it is, and nobody was
//   told.
#pragma once

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/nvme_format.h"

namespace foretoken::kvstore {

enum class WriteKind { kSuperblock, kHeader, kSlab };
enum class Moment { kBefore, kSubmitted, kTorn, kEnded };

struct DeathPoint {
  std::string_view name;
  WriteKind kind;
  Moment moment;
};

// A superblock is one sector, and so is a header, but for the empty ones of a new file.
inline constexpr std::array kDeathPoints = {
    DeathPoint{"superblock-before", WriteKind::kSuperblock, Moment::kBefore},
    DeathPoint{"superblock-submitted", WriteKind::kSuperblock, Moment::kSubmitted},
    DeathPoint{"superblock-ended", WriteKind::kSuperblock, Moment::kEnded},
    DeathPoint{"header-before", WriteKind::kHeader, Moment::kBefore},
    DeathPoint{"header-submitted", WriteKind::kHeader, Moment::kSubmitted},
    DeathPoint{"header-ended", WriteKind::kHeader, Moment::kEnded},
    DeathPoint{"slab-before", WriteKind::kSlab, Moment::kBefore},
    DeathPoint{"slab-submitted", WriteKind::kSlab, Moment::kSubmitted},
    DeathPoint{"slab-torn", WriteKind::kSlab, Moment::kTorn},
    DeathPoint{"slab-ended", WriteKind::kSlab, Moment::kEnded},
};

class DyingDevice : public BlockDevice {
 public:
  // Dies at the count-th write of the point's kind, counted from 1.
  DyingDevice(std::unique_ptr<BlockDevice> disk, const NvmeGeometry& geometry,
              const DeathPoint& point, int count)
      : disk_(std::move(disk)), geometry_(geometry), point_(point), left_(count) {}

  void submit(const IoOperation& operation) override {
    const bool counts =
        operation.direction == IoDirection::kWrite && kind_of(operation.offset) == point_.kind;
    if (counts && --left_ == 0) die_at(operation);
    disk_->submit(operation);
  }
  std::vector<IoDone> completed() override { return disk_->completed(); }
  Status resize(std::uint64_t bytes) override { return disk_->resize(bytes); }
  Result<std::uint64_t> size() const override { return disk_->size(); }
  int completion_fd() const override { return disk_->completion_fd(); }
  std::string_view name() const override { return disk_->name(); }

 private:
  WriteKind kind_of(std::uint64_t offset) const {
    if (offset < geometry_.header_offset(SlotIndex{0})) return WriteKind::kSuperblock;
    return offset < geometry_.slab_offset(SlotIndex{0}) ? WriteKind::kHeader : WriteKind::kSlab;
  }
  [[noreturn]] void die_at(IoOperation operation) {
    if (point_.moment == Moment::kTorn) {
      operation.bytes = operation.bytes / 2 / kSectorBytes * kSectorBytes;
    }
    if (point_.moment != Moment::kBefore) disk_->submit(operation);
    if (point_.moment == Moment::kTorn || point_.moment == Moment::kEnded) {
      wait_for(operation.tag);
    }
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  void wait_for(std::uint64_t tag) {
    for (;;) {
      pollfd ready{disk_->completion_fd(), POLLIN, 0};
      poll(&ready, 1, 1'000);
      const std::vector<IoDone> ended = disk_->completed();
      if (std::ranges::any_of(ended, [&](const IoDone& done) { return done.tag == tag; })) return;
    }
  }

  std::unique_ptr<BlockDevice> disk_;
  const NvmeGeometry geometry_;
  const DeathPoint point_;
  int left_;
};

}  // namespace foretoken::kvstore
