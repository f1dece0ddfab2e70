// NvmeTier: the second tier of the prefix cache: slabs in a file, by name. It may lose any of them
// at any time (a bad disk, a full one), and never gives wrong bytes: each block of a slab is
// checked on its way into the file and on its way back.
//
//   tier.store(name, slab, now);             // copies; written behind
//   tier.load(name, to, now);                // ends in one Loaded
//   ... completion_fd() is readable, deadline() has come, or has_more() ...
//   for (const Loaded& loaded : tier.advance(now)) ...
//
// A slab is written first and its header after it, so a torn write is a miss. Reads go before
// writes. Transfers go through the tier's own buffers: the arena's slab is free again when store()
// returns, and a read that never ends has nothing of the arena.
//
// When nothing else is to be done, slabs are read and checked one after another, so that what a
// disk has lost is known before it is asked for.
//
//   online      reads and writes
//   read-only   the file system is full: writes are tried again after a pause, which doubles
//   offline     operations failed again and again, or one never ended: as above, reads too
//
// Owns the buffers and the device. For one thread, which it never makes wait: the longest step of
// advance() is the check of one slab. Example: tests/kvstore/nvme_tier_test.cc
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/nvme_contents.h"
#include "kvstore/internal/nvme_file.h"
#include "kvstore/internal/nvme_health.h"
#include "kvstore/internal/nvme_index.h"
#include "kvstore/kv_store.h"

namespace foretoken::kvstore {

class NvmeTier {
 public:
  // Opens what is in the file, or lays it out (open_contents), on the device that works here.
  // Blocks. Errors: open_contents'. `file` must outlive the tier.
  static Result<std::unique_ptr<NvmeTier>> open(const NvmeFile& file, const NvmeOpening& opening);

  // Buffers for transfers of this model's slabs, and how many there are: the device's depth.
  static IoMemory make_memory(const ModelIdentity& model);
  static std::size_t memory_bytes(const ModelIdentity& model);  // of make_memory()
  static int depth(const ModelIdentity& model);

  // REQUIRES: memory is make_memory(model)'s, contents are what open_contents() gave.
  // cipher: the file's, which the device also seals with; null where it is not encrypted.
  NvmeTier(IoMemory memory, std::unique_ptr<BlockDevice> device, const NvmeContents& contents,
           std::shared_ptr<const KvCipher> cipher = nullptr);

  // Whether load() may be called for it.
  bool has(const SlabName& name, TimePoint now) const;
  // Whether the file has it, or is about to.
  bool knows(const SlabName& name) const { return index_.knows(name); }
  // It was wanted: it is the last to give way. Of a prefix, the first segment is touched last.
  void touch(const SlabName& name) { index_.touch(name); }

  // A prefix was asked for, of which the leading segments that are here are of use: for the order
  // in which the next store finds prefixes. Head 0 stands for all.
  void note_use(std::span<const PrefixKey> keys);
  // Writes that order behind, at the store's end: a header for each prefix that was asked for, the
  // last one first.
  void save_uses(TimePoint now);

  // Reads it to `to`, a slab's bytes, which are the tier's until its Loaded.
  // REQUIRES: has(name, now), no load of it is under way.
  void load(const SlabName& name, std::byte* to, TimePoint now);

  // A buffer and a slot are there for a write, and no read waits.
  bool can_store(TimePoint now) const;
  // Starts to write a copy. It gives way before the segment that its prefix has before it, whose
  // key is `previous`, as it is of no use without. False: the slab's own checksums refute it.
  // REQUIRES: can_store(now), !knows(name).
  bool store(const SlabName& name, const std::byte* slab, TimePoint now,
             const std::optional<PrefixKey>& previous = std::nullopt);

  // Slots for a sequence's own KV, which its rank reads and writes itself; they are in no index
  // until they are published, or given back. What the file says of them is overwritten behind, so
  // that the next store does not find it. nullopt: the file has not so many to give.
  std::optional<std::vector<SlotIndex>> lend(std::size_t count, TimePoint now);
  // The slot of a slab, for a rank to read: it keeps the slab until it is given back. It may be
  // borrowed more than once. REQUIRES: has(name).
  SlotIndex borrow(const SlabName& name);
  // A lent slot holds this slab now, whole but for its header, which is written behind; its holder
  // keeps it. Does nothing where the slab is here already, or the slot has a name.
  struct Filled {
    SlotIndex slot{};
    std::uint64_t digest = 0;                // of the slab's checksums
    Seal seal;                               // of its table, in an encrypted file
    std::optional<PrefixKey> previous = {};  // as of store()
  };
  void publish(const SlabName& name, const Filled& filled, TimePoint now);
  // Lent and borrowed ones. Of what has a name, the last one is given up first.
  void take_back(std::span<const SlotIndex> slots);
  // What a borrowed or published slot holds is not what its name says, or is about to say.
  void refute(SlotIndex slot, TimePoint now);
  bool may_lend(TimePoint now) const { return health_.may_write(now); }
  std::uint64_t slots_offset() const { return superblock_.geometry.slab_offset(SlotIndex{0}); }
  std::uint64_t file_id() const { return superblock_.file_id; }

  struct Loaded {
    SlabName name;
    bool is_whole = false;  // else `to` holds anything, and the caller does without
  };
  // Does what can be done without waiting, at most one slab's check of it.
  std::vector<Loaded> advance(TimePoint now);
  // advance() has more to do at once.
  bool has_more() const { return !ended_.empty(); }
  // When advance() is wanted although nothing has ended.
  std::optional<TimePoint> deadline() const;
  // Nothing is under way.
  bool is_idle() const {
    return num_in_flight_ == 0 && waiting_.empty() && headers_.empty() && ended_.empty();
  }

  int completion_fd() const { return device_->completion_fd(); }
  NvmeStat stat() const;  // without `dropped`, which is the caller's
  // For tests.
  void check() const { index_.check(); }

 private:
  enum class Kind { kLoad, kScrub, kStoreSlab, kStoreHeader, kBlankHeader };
  // Its slot is pinned by it.
  struct Transfer {
    Kind kind = Kind::kLoad;
    SlabName name;
    SlotIndex slot{};
    std::byte* to = nullptr;   // kLoad
    std::uint64_t digest = 0;  // of the slab's checksums
    std::optional<PrefixKey> previous = {};
    std::optional<std::uint64_t> number = {};  // of a header; nullopt: the next one
    SealedUnit slab{};                         // in its buffer
    std::size_t moved = 0;                     // bytes so far
    bool is_given_up = false;  // it only keeps its buffer and its slot until it ends
  };

  static bool reads(Kind kind) { return kind == Kind::kLoad || kind == Kind::kScrub; }
  static bool is_header(Kind kind) {
    return kind == Kind::kStoreHeader || kind == Kind::kBlankHeader;
  }
  std::span<std::byte> buffer(std::size_t index) const;  // of a slot and a header
  std::size_t slot_size() const { return superblock_.geometry.slot_bytes; }
  std::optional<std::size_t> free_buffer() const;
  std::size_t bytes_of(const Transfer& transfer) const;
  void occupy(std::size_t index, const Transfer& transfer, TimePoint now);
  void start(std::size_t index, const Transfer& transfer, TimePoint now);
  void submit(std::size_t index);
  void end(std::size_t index);
  bool copy_verified(std::byte* to, const std::byte* from) const;
  std::uint64_t digest_of(const std::byte* slab) const;
  void write_header(std::size_t index);
  void finish_store(std::size_t index);
  void place(const SlabName& name, const std::optional<PrefixKey>& previous);
  void blank(SlotIndex slot);
  void finish_blank(std::size_t index);
  void start_headers(TimePoint now);
  bool is_moving(SlotIndex slot) const;
  void start_loads(TimePoint now);
  Loaded finish_load(std::size_t index);
  bool may_scrub(TimePoint now) const;
  void start_scrub(TimePoint now);
  void finish_scrub(std::size_t index);
  bool is_whole(const std::byte* slab, std::uint64_t digest) const;
  void end_read(const Transfer& transfer, bool is_whole);
  void forget(const Transfer& read);
  void give_up_all(std::vector<Loaded>& loaded);
  void let_go(const Transfer& transfer);
  std::optional<TimePoint> stalled_at() const;
  void note_look(TimePoint now);
  void on_stalled(TimePoint now, std::vector<Loaded>& loaded);
  void on_ended(const IoDone& done, TimePoint now, std::vector<Loaded>& loaded);
  void on_moved(std::size_t index, TimePoint now, std::vector<Loaded>& loaded);
  void on_sealed_otherwise(std::size_t index, std::vector<Loaded>& loaded);
  void on_failed(std::size_t index, const Error& error, TimePoint now, std::vector<Loaded>& loaded);

  const Superblock superblock_;
  const kernels::KvShape shape_;  // of a slab
  IoMemory memory_;
  std::vector<std::optional<Transfer>> transfers_;  // in flight, by buffer
  std::unique_ptr<BlockDevice> device_;             // behind both: it uses them until it is gone
  const std::shared_ptr<const KvCipher> cipher_;
  NvmeIndex index_;
  NvmeHealth health_;
  std::deque<Transfer> waiting_;   // loads without a buffer
  std::deque<Transfer> headers_;   // to be written, without one
  std::vector<bool> is_blank_;     // by slot: the file has no header there
  std::deque<IoDone> ended_;       // not looked at yet
  std::size_t num_in_flight_ = 0;  // those given up included
  std::size_t num_given_up_ = 0;
  TimePoint last_progress_{};
  TimePoint last_look_{};  // advance()
  std::uint64_t next_number_;
  SlotIndex scrubbed_{};  // the next slab to check is here or behind
  TimePoint next_scrub_{};
  NvmeStat stat_;
};

}  // namespace foretoken::kvstore
