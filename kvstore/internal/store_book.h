// StoreBook: who holds which slab: the store's one source of truth. Leases (a connected rank, or a
// dead one whose exit is not confirmed yet) hold sequences; a sequence holds, on each of the
// lease's heads, one slab a segment. Ranks of a group that share a head share its slabs, but for
// those of an outsized sequence: each rank has its own.
//
// No sockets, no memory of KV: pure bookkeeping, tested against a plain model.
// Not thread-safe. Example: tests/kvstore/store_book_test.cc
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "common/ids.h"
#include "common/prefix_key.h"
#include "common/result.h"
#include "kvstore/internal/nvme_format.h"
#include "kvstore/internal/segment_keys.h"
#include "kvstore/internal/slab_pool.h"
#include "kvstore/kv_store.h"

namespace foretoken::kvstore {

enum class LeaseId : std::uint64_t {};

struct LeaseOwner {
  int group = 0;
  int rank = 0;
  Epoch epoch{};
  int first_head = 0;
  int num_heads = 0;
};

// Whose a sequence's slabs of a head are: of all ranks of the group that have the head, or of the
// one that reserves them.
enum class SlabsOf { kGroup, kRank };

// What a sequence holds, head by head of its lease.
struct Grant {
  std::vector<int> head_hits;    // [num_heads] leading segments that hold their prefix
  std::vector<SlabIndex> slabs;  // [num_heads, num_segments]; of an outsized one, fewer a head
  // An outsized one: comes with the NVMe file's descriptor. Slot i lies at slots_offset + i slabs;
  // the hits are in slots.
  std::uint64_t slots_offset = 0;
  std::vector<SlotIndex> slots = {};  // [num_heads, num_segments], or empty
  std::uint64_t file_id = 0;
};

class StoreBook {
 public:
  StoreBook(int num_heads, std::uint32_t slabs_per_head);

  // Slabs [0, num_ready) of every head may be handed out.
  void set_ready(std::uint32_t num_ready);
  // No more of them will be.
  void settle();
  std::uint32_t slabs_per_head() const { return pools_.front().num_slabs(); }

  LeaseId open_lease(const LeaseOwner& owner);
  // Releases all that the lease holds.
  void close_lease(LeaseId lease);
  // The open lease of (group, rank), if any.
  const LeaseOwner* find_lease(int group, int rank) const;
  // The leases of its group and epoch, itself included.
  std::map<LeaseId, LeaseOwner> group_of(LeaseId lease);

  // As KvStore's calls of the same names say. A call that fails changes nothing.
  Result<Grant> reserve(LeaseId lease, SequenceId sequence, std::span<const PrefixKey> keys,
                        int num_segments, SlabsOf whose = SlabsOf::kGroup);
  Result<Grant> use(LeaseId lease, SequenceId sequence, int hit_segments);
  Status commit(LeaseId lease, SequenceId sequence, int segment, const PrefixKey& key);
  Status distrust(LeaseId lease, SequenceId sequence);
  Status release(LeaseId lease, SequenceId sequence);
  // What reserve() would say, without its doing.
  Status can_reserve(LeaseId lease, SequenceId sequence, std::span<const PrefixKey> keys,
                     int num_segments, SlabsOf whose = SlabsOf::kGroup);

  // Slabs of a head that nobody holds, ready or not.
  std::uint32_t num_unheld(int head) const {
    const SlabPool& pool = pools_[static_cast<std::size_t>(head)];
    return pool.num_slabs() - pool.num_used();
  }

  // For the tier below. The key of the segment before this one, if the sequence has said it: also
  // where another one's slab is published with it. REQUIRES: commit() has taken this one.
  std::optional<PrefixKey> key_before(LeaseId lease, SequenceId sequence, int segment);
  // The published slab that holds `key`; refresh() also makes it the last one
  // to be evicted.
  std::optional<SlabIndex> find_published(int head, const PrefixKey& key) const;
  std::optional<SlabIndex> refresh(int head, const PrefixKey& key);
  // It does not hold what its key says: as distrust() of all who have it. No-op where there is
  // none.
  void distrust_published(int head, const PrefixKey& key);
  // As find_published(), and keeps it until return_slab().
  std::optional<SlabIndex> hold_published(int head, const PrefixKey& key) {
    return pool(head).find(key);
  }
  // A slab to fill from there: taken, published (unless the key has come otherwise) when it is
  // whole, and returned in any case.
  std::optional<SlabIndex> take_slab(int head) { return pool(head).acquire(); }
  void publish_slab(int head, SlabIndex slab, const PrefixKey& key) {
    pool(head).publish(slab, key);
  }
  void return_slab(int head, SlabIndex slab) { pool(head).release(slab); }

  // Hits and misses of a reservation that was looked up elsewhere.
  void count(std::int64_t hits, std::int64_t misses) {
    num_hits_ += hits;
    num_misses_ += misses;
  }
  StoreStat stat() const;  // bad_requests and nvme are the server's
  // Ends the process where an invariant is broken. For tests; walks everything.
  void check() const;

 private:
  // Who holds slabs. An epoch's sequences are its own: a restarted group never meets slabs of its
  // last life.
  struct Holder {
    int group = 0;
    Epoch epoch{};
    SequenceId sequence{};
    std::optional<int> rank;  // SlabsOf::kRank
    auto operator<=>(const Holder&) const = default;
  };
  struct Allocation {
    std::vector<SlabIndex> slabs;
    int hits = 0;
    int num_leases = 0;  // that hold them
  };
  struct Sequence {
    Holder holder;
    SegmentKeys keys;
  };
  struct Lease {
    LeaseOwner owner;
    std::map<SequenceId, Sequence> sequences;
  };

  Lease& at(LeaseId lease);
  SlabPool& pool(int head) { return pools_[static_cast<std::size_t>(head)]; }
  static Holder holder_of(const LeaseOwner& owner, SequenceId sequence, SlabsOf whose);
  Allocation* find(const Holder& holder, int head);
  Status check_room(const Holder& holder, int head, std::span<const PrefixKey> keys,
                    int num_segments);
  void hold(const Holder& holder, int head, std::span<const PrefixKey> keys, int num_segments);
  void drop(const Holder& holder, int head);
  void drop_all(const LeaseOwner& owner, const Holder& holder);
  std::uint32_t num_to_swap(const Allocation& allocation, int head, int hit_segments);
  void trim(Allocation& allocation, int head, int hit_segments);
  Grant grant_of(const LeaseOwner& owner, const Holder& holder);

  std::vector<SlabPool> pools_;  // by head
  std::map<LeaseId, Lease> leases_;
  std::map<std::pair<Holder, int>, Allocation> allocations_;  // by holder and head
  std::uint64_t next_lease_ = 1;
  std::int64_t num_hits_ = 0;
  std::int64_t num_misses_ = 0;
};

}  // namespace foretoken::kvstore
