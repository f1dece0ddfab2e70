// DyingDevice: passes all on to a disk, and kills its process at a named point of what it does
// there. Below the sealing device: what it is given is sealed.
//
//   kBefore    the operation is not begun        kTorn...   some of it is on the disk
//   kSubmitted it is under way                   kEnded     all of it is, and nobody was told
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

// What the tier is at, as its user says.
enum class During {
  kLayout,        // an opening of an empty file
  kOpening,       // of another one: its generation rises, its headers are read
  kStore,         // into a slot that holds nothing
  kChainedStore,  // of a slab that names the one before it
  kGivingWay,     // a store into a slot whose slab gives way
  kLending,       // slots are lent, and the file is to say nothing of them
  kPublishing,    // a lent slot is filled past the tier, and gets its header
  kRefuting,      // a slab is said to be wrong, and its header is taken away
  kSavingUses,    // as at the orderly end
  kScrubbing,     // slabs are read
};
enum class Part { kLength, kSuperblockA, kSuperblockB, kHeaders, kSlab };
enum class Moment { kBefore, kSubmitted, kTornAtFirst, kTornHalfway, kTornAtLast, kEnded };

struct DeathPoint {
  std::string_view name;
  During during;
  Part part;
  Moment moment;
};

// Of a file that lives on. A superblock and a header are a sector each: not torn.
inline constexpr std::array kDeathPoints = {
    DeathPoint{"superblock-a-before", During::kOpening, Part::kSuperblockA, Moment::kBefore},
    DeathPoint{"superblock-a-submitted", During::kOpening, Part::kSuperblockA, Moment::kSubmitted},
    DeathPoint{"superblock-a-ended", During::kOpening, Part::kSuperblockA, Moment::kEnded},
    DeathPoint{"superblock-b-before", During::kOpening, Part::kSuperblockB, Moment::kBefore},
    DeathPoint{"superblock-b-submitted", During::kOpening, Part::kSuperblockB, Moment::kSubmitted},
    DeathPoint{"superblock-b-ended", During::kOpening, Part::kSuperblockB, Moment::kEnded},
    DeathPoint{"rebuild-before", During::kOpening, Part::kHeaders, Moment::kBefore},
    DeathPoint{"rebuild-submitted", During::kOpening, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"rebuild-ended", During::kOpening, Part::kHeaders, Moment::kEnded},
    DeathPoint{"slab-before", During::kStore, Part::kSlab, Moment::kBefore},
    DeathPoint{"slab-submitted", During::kStore, Part::kSlab, Moment::kSubmitted},
    DeathPoint{"slab-first-sector", During::kStore, Part::kSlab, Moment::kTornAtFirst},
    DeathPoint{"slab-half", During::kStore, Part::kSlab, Moment::kTornHalfway},
    DeathPoint{"slab-but-its-table", During::kStore, Part::kSlab, Moment::kTornAtLast},
    DeathPoint{"slab-ended", During::kStore, Part::kSlab, Moment::kEnded},
    DeathPoint{"header-before", During::kStore, Part::kHeaders, Moment::kBefore},
    DeathPoint{"header-submitted", During::kStore, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"header-ended", During::kStore, Part::kHeaders, Moment::kEnded},
    DeathPoint{"chained-before", During::kChainedStore, Part::kHeaders, Moment::kBefore},
    DeathPoint{"chained-submitted", During::kChainedStore, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"chained-ended", During::kChainedStore, Part::kHeaders, Moment::kEnded},
    DeathPoint{"over-slab-before", During::kGivingWay, Part::kSlab, Moment::kBefore},
    DeathPoint{"over-slab-submitted", During::kGivingWay, Part::kSlab, Moment::kSubmitted},
    DeathPoint{"over-slab-first-sector", During::kGivingWay, Part::kSlab, Moment::kTornAtFirst},
    DeathPoint{"over-slab-half", During::kGivingWay, Part::kSlab, Moment::kTornHalfway},
    DeathPoint{"over-slab-but-its-table", During::kGivingWay, Part::kSlab, Moment::kTornAtLast},
    DeathPoint{"over-slab-ended", During::kGivingWay, Part::kSlab, Moment::kEnded},
    DeathPoint{"over-header-before", During::kGivingWay, Part::kHeaders, Moment::kBefore},
    DeathPoint{"over-header-submitted", During::kGivingWay, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"over-header-ended", During::kGivingWay, Part::kHeaders, Moment::kEnded},
    DeathPoint{"lent-before", During::kLending, Part::kHeaders, Moment::kBefore},
    DeathPoint{"lent-submitted", During::kLending, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"lent-ended", During::kLending, Part::kHeaders, Moment::kEnded},
    DeathPoint{"filled-submitted", During::kPublishing, Part::kSlab, Moment::kSubmitted},
    DeathPoint{"filled-half", During::kPublishing, Part::kSlab, Moment::kTornHalfway},
    DeathPoint{"filled-but-its-table", During::kPublishing, Part::kSlab, Moment::kTornAtLast},
    DeathPoint{"filled-ended", During::kPublishing, Part::kSlab, Moment::kEnded},
    DeathPoint{"published-before", During::kPublishing, Part::kHeaders, Moment::kBefore},
    DeathPoint{"published-submitted", During::kPublishing, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"published-ended", During::kPublishing, Part::kHeaders, Moment::kEnded},
    DeathPoint{"refuted-before", During::kRefuting, Part::kHeaders, Moment::kBefore},
    DeathPoint{"refuted-submitted", During::kRefuting, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"refuted-ended", During::kRefuting, Part::kHeaders, Moment::kEnded},
    DeathPoint{"uses-before", During::kSavingUses, Part::kHeaders, Moment::kBefore},
    DeathPoint{"uses-submitted", During::kSavingUses, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"uses-ended", During::kSavingUses, Part::kHeaders, Moment::kEnded},
    DeathPoint{"scrub-before", During::kScrubbing, Part::kSlab, Moment::kBefore},
    DeathPoint{"scrub-submitted", During::kScrubbing, Part::kSlab, Moment::kSubmitted},
    DeathPoint{"scrub-ended", During::kScrubbing, Part::kSlab, Moment::kEnded},
};

// Of a file's first opening.
inline constexpr std::array kLayoutPoints = {
    DeathPoint{"length-before", During::kLayout, Part::kLength, Moment::kBefore},
    DeathPoint{"length-ended", During::kLayout, Part::kLength, Moment::kEnded},
    DeathPoint{"empty-headers-before", During::kLayout, Part::kHeaders, Moment::kBefore},
    DeathPoint{"empty-headers-submitted", During::kLayout, Part::kHeaders, Moment::kSubmitted},
    DeathPoint{"empty-headers-half", During::kLayout, Part::kHeaders, Moment::kTornHalfway},
    DeathPoint{"empty-headers-ended", During::kLayout, Part::kHeaders, Moment::kEnded},
    DeathPoint{"first-superblock-before", During::kLayout, Part::kSuperblockA, Moment::kBefore},
    DeathPoint{"first-superblock-ended", During::kLayout, Part::kSuperblockA, Moment::kEnded},
    DeathPoint{"second-superblock-before", During::kLayout, Part::kSuperblockB, Moment::kBefore},
    DeathPoint{"second-superblock-ended", During::kLayout, Part::kSuperblockB, Moment::kEnded},
};

class DyingDevice : public BlockDevice {
 public:
  // Dies at the count-th operation that is at the point, counted from 1. `during` is what the tier
  // is at: it changes behind us.
  DyingDevice(std::unique_ptr<BlockDevice> disk, const NvmeGeometry& geometry, const During& during,
              const DeathPoint& point, int count)
      : disk_(std::move(disk)), geometry_(geometry), during_(during), point_(point), left_(count) {}

  void submit(const IoOperation& operation) override {
    if (is_at_point(part_of(operation.offset), operation.direction) && --left_ == 0) {
      die_at(operation);
    }
    disk_->submit(operation);
  }
  std::vector<IoDone> completed() override { return disk_->completed(); }
  Status resize(std::uint64_t bytes) override {
    const bool dies = bytes > 0 && is_at_point(Part::kLength, IoDirection::kWrite);
    if (dies && point_.moment == Moment::kBefore) die();
    Status resized = disk_->resize(bytes);
    if (dies) die();
    return resized;
  }
  Result<std::uint64_t> size() const override { return disk_->size(); }
  int completion_fd() const override { return disk_->completion_fd(); }
  std::string_view name() const override { return disk_->name(); }

 private:
  bool is_at_point(Part part, IoDirection direction) const {
    const bool is_scan = point_.during == During::kOpening && point_.part == Part::kHeaders;
    const bool reads = is_scan || point_.during == During::kScrubbing;
    return during_ == point_.during && part == point_.part &&
           (direction == IoDirection::kRead) == reads;
  }
  Part part_of(std::uint64_t offset) const {
    if (offset < NvmeGeometry::superblock_offset(1)) return Part::kSuperblockA;
    if (offset < geometry_.header_offset(SlotIndex{0})) return Part::kSuperblockB;
    return offset < geometry_.slab_offset(SlotIndex{0}) ? Part::kHeaders : Part::kSlab;
  }
  // Of an operation that is torn: whole sectors.
  std::size_t bytes_until(Moment moment, std::size_t bytes) const {
    if (moment == Moment::kTornAtFirst) return kSectorBytes;
    if (moment == Moment::kTornHalfway) return bytes / 2 / kSectorBytes * kSectorBytes;
    return moment == Moment::kTornAtLast ? bytes - kSectorBytes : bytes;
  }
  [[noreturn]] void die_at(IoOperation operation) {
    operation.bytes = bytes_until(point_.moment, operation.bytes);
    if (point_.moment != Moment::kBefore) disk_->submit(operation);
    if (point_.moment > Moment::kSubmitted) wait_for(operation.tag);
    die();
  }
  [[noreturn]] static void die() {
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
  const During& during_;
  const DeathPoint point_;
  int left_;
};

}  // namespace foretoken::kvstore
