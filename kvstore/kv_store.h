// KvStore: a rank's door to the node's KV store. The store process (foretoken-kvstore) owns the
// arena, a sealed memfd striped by KV head; a rank maps its own heads' stripes and registers them
// with its device, so that ops read and write KV there without the store's help. Only who owns
// which slab is asked of the store: at admission (reserve, use), when a segment is complete
// (commit) and at the end (release). A decode step asks nothing.
//
//   auto store = KvStore::connect(config, device).value_or_throw();
//   auto kv = store->reserve(sequence, keys, segments_for(prompt + max_tokens));
//   const int hits = least_over_ranks(kv->hit_segments);
//   store->use(*kv, hits);                    // copy kv->slabs to SequenceKv::slabs now
//   store->pack(...);  store->commit(sequence, segment, key);  // after the copy has completed
//   store->fetch(layer, ..., copy_stream);  store->wait(layer, compute_stream);   // every step
//   store->release(sequence);
//
// A sequence that is larger than the whole arena runs from NVMe, where the store has that tier: its
// Reservation has `outsized` in place of slabs (kvstore/outsized_kv.h), its hits are what NVMe has,
// and it publishes by OutsizedKv::publish() and publish_written(), in place of commit().
//
// Owns the connection, the mapping and one event a layer. Everything that a
// sequence holds is freed by the store when the KvStore is destroyed, or when the process has died.
// All arena traffic goes through here (fetch, pack, unpack, write_through, streamed_attention), so
// that guard_arena can prove it.
//
// Thread rule: one thread calls requests; ops as device.h says. Errors of a request: kUnavailable
// when the store is gone (the group must restart), kTimeout after config.timeout.
// Example: tests/kvstore/kv_store_test.cc; messages and layout: docs/formats.md.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/ids.h"
#include "common/prefix_key.h"
#include "common/result.h"
#include "kernels/device.h"
#include "kernels/kv_layout.h"
#include "kvstore/outsized_kv.h"

namespace foretoken::kvstore {

struct StoreClientConfig {
  std::string socket_path;
  int group = 0;
  int rank = 0;
  Epoch epoch{};
  std::string model_hash;    // what Ready tells; another model's store refuses
  int total_kv_heads = 0;    // of the model
  int first_head = 0;        // this rank's: [first_head, first_head + shape.num_kv_heads)
  kernels::KvShape shape;    // of this rank
  bool guard_arena = false;  // test aid: the mapping is PROT_NONE but inside the ops below, each
                             // of which then waits for its stream
  std::chrono::milliseconds timeout{30'000};  // of connecting and of each request
  // While no store answers: one that starts beside this rank may have to wait for one that was
  // killed, which is still being connected to until it has ended.
  std::chrono::milliseconds patience{0};
};

// A sequence's slabs on this rank. Segments [0, hit_segments) hold KV of the prefix that was asked
// for and must not be written; the others are private, their bytes undefined.
struct Reservation {
  SequenceId sequence{};
  int num_segments = 0;
  int hit_segments = 0;           // the least over this rank's heads
  std::vector<int> head_hits;     // [num_kv_heads] hits of each head, >= hit_segments
  std::vector<std::byte*> slabs;  // [num_kv_heads, num_segments] device addresses
  // Of a sequence that is larger than the arena. It ends before the sequence is released, and
  // before the KvStore does.
  std::unique_ptr<OutsizedKv> outsized;
};

// Whether the NVMe tier works: kOff where the store has none; kReadOnly while the file system is
// full; kOffline while operations fail.
enum class NvmeState { kOff, kOnline, kReadOnly, kOffline };
std::string_view nvme_state_name(NvmeState state);  // "off", "online", "read-only", "offline"

// The NVMe tier, all heads together; counts since the store's start.
struct NvmeStat {
  NvmeState state = NvmeState::kOff;
  std::int64_t slabs_total = 0;        // that the file has room for
  std::int64_t slabs_held = 0;         // that it holds
  std::int64_t slabs_read = 0;         // brought back into the arena
  std::int64_t slabs_written = 0;      // written behind
  std::int64_t bytes_read = 0;         // for the arena, whole or not; idle checks are not counted
  std::int64_t bytes_written = 0;      // without headers
  std::int64_t evictions = 0;          // slabs that gave way in the file
  std::int64_t dropped = 0;            // slabs that left the arena before they could be written
  std::int64_t io_errors = 0;          // operations that failed, or never ended
  std::int64_t checksum_failures = 0;  // headers and slabs of the file that failed their check
  std::int64_t host_checksum_failures = 0;  // slabs of the arena that failed it, so weren't written
  std::int64_t tokens_passed_over = 0;      // it had, but computing them anew takes less time
  bool operator==(const NvmeStat&) const = default;
};

// What prefill has taken lately on this rank, in token x layers: of the prompts that it computed
// for the most part; and of reused prefixes of outsized sequences, what it waited for the disk.
struct PrefillTimes {
  std::int64_t computed = 0;
  std::chrono::microseconds computing{0};
  std::int64_t read = 0;
  std::chrono::microseconds reading{0};
};

// Slabs a head, over the whole node, of the head that has the fewest free.
struct StoreStat {
  std::int64_t slabs_total = 0;   // that fit the arena; fewer where memory was short
  std::int64_t slabs_ready = 0;   // pre-faulted: what may be reserved
  std::int64_t slabs_free = 0;    // ready and empty
  std::int64_t slabs_used = 0;    // held by a sequence, private or shared
  std::int64_t slabs_cached = 0;  // hold a prefix that nobody uses now; evicted when room is needed
  std::int64_t hits = 0;          // segments x heads found by reserve, since the store's start
  std::int64_t misses = 0;        // ... asked for and not found
  std::int64_t evictions = 0;     // cached slabs that gave way
  std::int64_t leases = 0;        // connected ranks, and dead ones whose exit is awaited
  std::int64_t sequences = 0;
  std::int64_t bad_requests = 0;  // one-way requests that were wrong
  NvmeStat nvme;
};

class KvStore {
 public:
  // Connects, waits for the end of an older epoch's lease of this (group, rank), maps and
  // registers. Error: kInvalidArgument for another model or shape, kUnavailable, kTimeout.
  static Result<std::unique_ptr<KvStore>> connect(const StoreClientConfig& config,
                                                  kernels::Device& device);
  ~KvStore();
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;

  // Slabs for num_segments segments on all heads of this rank, reusing the longest run of `keys`
  // (of the prompt's first segments; the caller keeps to floor((len - 64) / 256)) that is there,
  // and not on NVMe alone where reading it takes longer than computing it.
  // A second rank of the group that shares a head gets the same slabs, but for an outsized
  // sequence, of which each rank has its own KV.
  // Never waits for a disk, but for the checksums of an outsized sequence's hits. Error: kExhausted
  // (may pass, nothing is held), kPending (some of the prefix is on its way from NVMe: come again
  // within a second), kInvalidArgument (can never fit), kUnavailable (it would need the NVMe tier,
  // whose disk fails now).
  Result<Reservation> reserve(SequenceId sequence, std::span<const PrefixKey> keys,
                              int num_segments);

  // All ranks agreed on hit_segments: hits past it are swapped for private slabs (kv.slabs
  // changes). No round trip where nothing changes. Error: kExhausted; the caller releases the
  // sequence. REQUIRES: hit_segments <= kv.hit_segments.
  Status use(Reservation& kv, int hit_segments);

  // Publishes a filled segment of this rank's heads under its key; before, nobody else sees it. A
  // segment that is a hit, or whose key is there already, stays as it is. One-way: not waited for.
  // REQUIRES: the copies into the slab have completed (an event, not just an enqueue), and this
  // rank is the one that writes its heads.
  Status commit(SequenceId sequence, int segment, const PrefixKey& key);

  // Tells the store which segments of an outsized sequence are whole on NVMe, and which slots there
  // failed their check. Often, and before release(). One-way.
  Status publish_written(Reservation& kv);

  // For the store to weigh reading a prefix from NVMe against computing it anew. One-way.
  Status note_prefill(const PrefillTimes& times);

  // KV of the sequence failed its check. Its slabs serve as nobody's prefix from now on, and are
  // the last ones to be handed out again. Nothing more of it is published. One-way.
  Status distrust(SequenceId sequence);

  // Gives the sequence's slabs back. One-way. REQUIRES: no op in flight touches them.
  Status release(SequenceId sequence);

  Result<StoreStat> stat();

  // Slabs a head in the arena, as far as this rank has it mapped: fewer than the store has planned
  // where memory was short when this connected.
  std::int64_t slabs_per_head() const;

  // Enqueues the gather of layers [layer, layer + num_layers) on `stream` (a copy stream).
  void fetch(int layer, int num_layers, const kernels::SequenceKv* sequences,
             const kernels::FetchList* fetches, int rows, kernels::Stream& stream);
  // Later work of `stream` starts after the last fetch of `layer`, if there was one. REQUIRES: the
  // layers before it in that fetch have been waited for.
  void wait(int layer, kernels::Stream& stream);
  // Whether the last fetch that began with `layer` has ended; true if there was none.
  bool fetched(int layer) const;

  void pack(const kernels::PackBlocksArgs& args, kernels::Stream& stream);
  void unpack(const kernels::UnpackBlocksArgs& args, kernels::Stream& stream);
  void streamed_attention(const kernels::DecodeAttentionArgs& args, kernels::Stream& stream);
  void write_through(const kernels::WriteThroughArgs& args, kernels::Stream& stream);

 private:
  struct Impl;
  explicit KvStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken::kvstore
