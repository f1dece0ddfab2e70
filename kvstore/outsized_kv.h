// OutsizedKv: the KV of a sequence that is larger than the arena, on one rank. A layer's run of a
// segment is in a frame (a run's place in the slabs that the sequence holds), or on NVMe alone, in
// a slot that the store has lent to the sequence.
//
//   kv.make_room(layer, {0, n});  ... pack ...  kv.fill(layer, {0, whole});     // prefill
//   kv.make_room(layer, {s, s + 1});  ... write-through ...  kv.fill(...);      // decode's segment
//   kv.ask(layer, runs);  ...  kv.wait(layer, runs);  ... gather ...  kv.let_go(layer);
//
// Its first segments may be another sequence's prefix, which stands on NVMe (reuse); and others may
// reuse what it publishes, once that is there:
//
//   kv.publish(segment, key);  ...  for (const Published& segment : kv.take_published()) ...
//
// A run that was filled is written behind; only what is on NVMe leaves its frame, and then what has
// the lowest score, and of those what was wanted longest ago. Each block is verified on its way out
// and on its way back, against checksums that stay in host memory. A block that fails, or a disk
// that does, costs the sequence: status() says so from then on, the frames hold what they held, and
// every call does nothing. The sequence's KV is then to be computed anew from its tokens.
//
// Owns its tables; frames and slots are the store's, until the sequence is released. Ops in flight
// read the tables: a run that a layer holds, or that is being filled, stays where it is, and one
// that has come from NVMe is shown to them by show_arrived() alone, which make_room() and wait()
// call too. So while ops read what they were asked for, only advance() and promote() may be called.
// For one thread. Example: tests/kvstore/outsized_kv_test.cc
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/prefix_key.h"
#include "common/result.h"
#include "kernels/device.h"
#include "kernels/kv_layout.h"

namespace foretoken::kvstore {

class ArenaGuard;
class RunIo;
struct Seal;
struct SlotTable;

enum class RunIndex : std::uint32_t {};  // (layer * num_kv_heads + head) * num_segments + segment

struct HeadSegment {
  int head = 0;
  int segment = 0;
  bool operator==(const HeadSegment&) const = default;
};
// Segments [first, end).
struct Segments {
  int first = 0;
  int end = 0;
};

class OutsizedKv {
 public:
  // A run's place in the arena.
  struct Frame {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
  };
  struct Parts {
    kernels::KvShape shape;
    int num_segments = 0;
    std::vector<Frame> frames;
    std::vector<std::uint64_t> slots;  // [num_kv_heads, num_segments] offsets in the NVMe file
    bool is_sealed = false;            // the file is encrypted
  };
  // `guard` may be null. REQUIRES: parts.frames has least_frames() or more.
  OutsizedKv(kernels::Device& device, RunIo& io, ArenaGuard* guard, Parts parts);
  ~OutsizedKv();  // waits for what is under way
  OutsizedKv(const OutsizedKv&) = delete;
  OutsizedKv& operator=(const OutsizedKv&) = delete;

  // Frames that a sequence needs: one layer of all segments is attended at a time, while another
  // one leaves, and an open segment has all layers.
  static std::size_t least_frames(const kernels::KvShape& shape, int num_segments);

  // SequenceKv's.
  std::byte* const* runs() const { return runs_; }
  std::byte* const* runs_of(int layer) const;  // of them, [num_kv_heads, num_segments]
  std::uint64_t* checksums() const { return checksums_; }
  // Selection's segment_scores: how near a run is to being wanted. Zeros until they are written,
  // which a GPU may do at any time: they order what leaves and what comes, and nothing else.
  float* scores() const { return scores_; }

  // The segment's slot on that head holds a prefix: its runs are on NVMe. REQUIRES: nothing of the
  // segment has been filled; on all heads, and on all segments before it, before the sequence runs.
  void reuse(HeadSegment run, const SlotTable& table);
  // Fewer segments hold a prefix, as the group agreed; `slots` are all slots from now on.
  void use(int hit_segments, std::vector<std::uint64_t> slots);

  // The segment is filled, and serves as a prefix under this key once it is on NVMe. Does nothing
  // for one that is reused.
  void publish(int segment, const PrefixKey& key);
  struct Published {
    int segment = 0;
    PrefixKey key;
    std::vector<std::uint64_t> digests;  // [num_kv_heads] of the slots' checksums
    std::vector<Seal> seals;             // [num_kv_heads] of the slots' tables; where is_sealed
  };
  // Those whose slots are whole, but for the headers, since the last call.
  std::vector<Published> take_published();
  // Waits for those that are to be published, no longer than so.
  void finish_publishing(std::chrono::milliseconds limit);
  // Slots that failed their check, since the last call.
  std::vector<HeadSegment> take_refuted();

  // Gives runs of all heads their frames, to be filled; their bytes are undefined. Waits for the
  // disk where others must leave first. REQUIRES: they were never given one.
  Status make_room(int layer, Segments segments);
  // Ops have filled them, all blocks.
  void fill(int layer, Segments segments);

  // Runs that ops of the layer are to read, soon: they stay in their frames until let_go(layer);
  // what is not there is asked of the disk, which advance() tells. False: that would leave too few
  // frames for one whole layer, so only the first ones were. REQUIRES: they have room, or are
  // filled.
  bool ask(int layer, std::span<const HeadSegment> runs);
  // ask() for all heads.
  bool ask(int layer, Segments segments);
  // What was asked for, has not been begun, and is held by no layer any more, is not read.
  void drop_unheld();
  // Now: until all are there.
  Status wait(int layer, std::span<const HeadSegment> runs);
  // wait() for all heads.
  Status wait(int layer, Segments segments);
  void let_go(int layer);
  // Asks the disk for some of the runs of the highest scores, in place of ones of lower scores.
  // Once a step, when it has asked for what it needs.
  void promote();
  bool is_here(int layer, HeadSegment run) const;  // and shown

  // Does what can be done without waiting, for at most so many transfers that have ended.
  void advance(std::size_t most = std::numeric_limits<std::size_t>::max());
  // Ops find what has come. REQUIRES: none in flight reads the tables.
  void show_arrived();

  const Status& status() const { return status_; }
  std::int64_t bytes_read() const { return bytes_read_; }  // from NVMe

 private:
  class Listener;
  // kEmpty: nowhere. kOpen: in a frame, being filled. kDirty, kWriting: in a frame, soon on NVMe.
  // kHere: in a frame and on NVMe. kStored: on NVMe alone; kAsked: and waits to be read. kComing:
  // is being read, to its frame. kArrived: is there, and not shown yet.
  enum class Place : std::uint8_t {
    kEmpty,
    kOpen,
    kDirty,
    kWriting,
    kHere,
    kStored,
    kAsked,
    kComing,
    kArrived
  };
  struct Run {
    Place place = Place::kEmpty;
    bool is_held = false;      // by its layer
    std::uint32_t frame = 0;   // unless kEmpty, kStored or kAsked
    std::uint64_t wanted = 0;  // when, last
  };

  RunIndex index(int layer, HeadSegment run) const;
  std::vector<HeadSegment> on_all_heads(Segments segments) const;
  Run& at(RunIndex run) { return runs_state_[static_cast<std::size_t>(run)]; }
  int layer_of(RunIndex run) const;
  std::uint64_t offset(RunIndex run) const;
  bool in_frame(const Run& run) const;
  void hold(int layer, RunIndex run);
  std::optional<std::uint32_t> take_frame();
  std::vector<RunIndex> least_wanted(std::size_t count) const;
  void evict(RunIndex run);
  void ask_for(RunIndex run);
  void show(RunIndex run);
  void hide(RunIndex run);
  Status wait_for_end();
  void start_reads();
  void start_writes();
  bool copy_verified(std::byte* to, const std::byte* from, RunIndex run);
  void on_read(RunIndex index, const Result<std::span<const std::byte>>& bytes);
  void on_written(RunIndex index, const Result<Seal>& written);
  void fail(const Error& error);
  void on_slot_failed(RunIndex run, const Error& error);
  bool is_reused(RunIndex run) const;
  // Of slots that are published: named behind all runs.
  RunIndex table_index(int head, int segment) const;
  bool is_table(RunIndex run) const { return static_cast<std::size_t>(run) >= runs_state_.size(); }
  void start_tables();
  void write_table(int head);
  void on_table_written(RunIndex index, const Result<Seal>& written);

  kernels::Device& device_;
  RunIo& io_;
  ArenaGuard* guard_;
  Parts parts_;
  void* tables_;  // pinned, all three:
  std::byte** runs_;
  std::uint64_t* checksums_;
  float* scores_;
  std::vector<Run> runs_state_;  // by RunIndex
  std::vector<Seal> seals_;      // by RunIndex: of what is on NVMe
  std::vector<std::uint32_t> free_frames_;
  std::vector<std::vector<RunIndex>> held_;  // by layer
  std::size_t num_held_ = 0;
  std::deque<RunIndex> to_read_;  // kAsked
  std::deque<RunIndex> to_write_;
  std::vector<RunIndex> arrived_;
  std::int64_t num_ended_ = 0;
  std::uint64_t clock_ = 0;  // of wanted
  std::int64_t bytes_read_ = 0;
  Status status_ = Ok{};
  std::optional<Error> last_error_;  // of a write
  int num_reused_ = 0;               // segments
  std::vector<int> num_unwritten_;   // by segment: runs that are not on NVMe
  // To be published, in order; of the first one, tables of heads [0, tables_begun_) are being
  // written, or are.
  std::deque<Published> to_publish_;
  int tables_begun_ = 0;
  int tables_written_ = 0;
  bool table_failed_ = false;  // one of them
  std::vector<Published> published_;
  std::vector<HeadSegment> refuted_;
  std::unique_ptr<Listener> listener_;
};

}  // namespace foretoken::kvstore
