#include "kvstore/internal/store_book.h"

#include <algorithm>
#include <string>

#include "common/check.h"

namespace foretoken::kvstore {
namespace {

Error invalid(std::string message) { return {ErrorCode::kInvalidArgument, std::move(message)}; }

std::string name_of(SequenceId sequence) { return "sequence " + std::to_string(raw(sequence)); }

Error not_reserved(SequenceId sequence) { return invalid(name_of(sequence) + " is not reserved"); }

}  // namespace

StoreBook::StoreBook(int num_heads, std::uint32_t slabs_per_head)
    : pools_(static_cast<std::size_t>(num_heads), SlabPool(slabs_per_head)) {}

void StoreBook::set_ready(std::uint32_t num_ready) {
  for (SlabPool& pool : pools_) pool.set_ready(num_ready);
}

void StoreBook::settle() {
  for (SlabPool& pool : pools_) pool.settle();
}

// ---- leases -----------------------------------------------------------------------------------

LeaseId StoreBook::open_lease(const LeaseOwner& owner) {
  FT_CHECK(owner.first_head >= 0 && owner.num_heads > 0, owner.first_head, owner.num_heads);
  FT_CHECK(static_cast<std::size_t>(owner.first_head + owner.num_heads) <= pools_.size());
  const LeaseId id{next_lease_++};
  leases_.emplace(id, Lease{owner, {}});
  return id;
}

void StoreBook::close_lease(LeaseId id) {
  const Lease& lease = at(id);
  for (const auto& [name, sequence] : lease.sequences) drop_all(lease.owner, sequence.holder);
  leases_.erase(id);
}

const LeaseOwner* StoreBook::find_lease(int group, int rank) const {
  for (const auto& [id, lease] : leases_) {
    if (lease.owner.group == group && lease.owner.rank == rank) return &lease.owner;
  }
  return nullptr;
}

std::map<LeaseId, LeaseOwner> StoreBook::group_of(LeaseId lease) {
  const LeaseOwner& member = at(lease).owner;
  std::map<LeaseId, LeaseOwner> group;
  for (const auto& [id, other] : leases_) {
    const LeaseOwner& owner = other.owner;
    if (owner.group == member.group && owner.epoch == member.epoch) group.emplace(id, owner);
  }
  return group;
}

StoreBook::Lease& StoreBook::at(LeaseId id) {
  const auto found = leases_.find(id);
  FT_CHECK(found != leases_.end(), raw(id));
  return found->second;
}

// ---- sequences --------------------------------------------------------------------------------

Result<Grant> StoreBook::reserve(LeaseId id, SequenceId sequence, std::span<const PrefixKey> keys,
                                 int num_segments, SlabsOf whose) {
  FT_RETURN_IF_ERROR(can_reserve(id, sequence, keys, num_segments, whose));
  Lease& lease = at(id);
  const LeaseOwner& owner = lease.owner;
  const Holder holder = holder_of(owner, sequence, whose);
  for (int i = 0; i < owner.num_heads; ++i) {
    hold(holder, owner.first_head + i, keys, num_segments);
  }
  lease.sequences.emplace(sequence, Sequence{holder, SegmentKeys({keys.begin(), keys.end()})});
  return grant_of(owner, holder);
}

StoreBook::Holder StoreBook::holder_of(const LeaseOwner& owner, SequenceId sequence,
                                       SlabsOf whose) {
  return {owner.group, owner.epoch, sequence,
          whose == SlabsOf::kRank ? std::optional(owner.rank) : std::nullopt};
}

Status StoreBook::can_reserve(LeaseId id, SequenceId sequence, std::span<const PrefixKey> keys,
                              int num_segments, SlabsOf whose) {
  const Lease& lease = at(id);
  const LeaseOwner& owner = lease.owner;
  if (lease.sequences.contains(sequence)) {
    return invalid(name_of(sequence) + " is reserved already");
  }
  if (num_segments < 1 || keys.size() > static_cast<std::size_t>(num_segments)) {
    return invalid(std::to_string(keys.size()) + " keys for " + std::to_string(num_segments) +
                   " segments");
  }
  if (static_cast<std::uint32_t>(num_segments) > slabs_per_head()) {
    return invalid(std::to_string(num_segments) + " segments can never fit: the arena holds " +
                   std::to_string(slabs_per_head()) +
                   " slabs a head; give the store a larger arena");
  }
  const Holder holder = holder_of(owner, sequence, whose);
  for (int i = 0; i < owner.num_heads; ++i) {
    FT_RETURN_IF_ERROR(check_room(holder, owner.first_head + i, keys, num_segments));
  }
  return Ok{};
}

// Whether hold() will find its slabs. Hits that nobody holds are not to be counted as empty ones.
Status StoreBook::check_room(const Holder& holder, int head, std::span<const PrefixKey> keys,
                             int num_segments) {
  if (const Allocation* shared = find(holder, head)) {
    if (shared->slabs.size() == static_cast<std::size_t>(num_segments)) return Ok{};
    return invalid(name_of(holder.sequence) + ": ranks that share head " + std::to_string(head) +
                   " ask for different lengths");
  }
  const SlabPool::Run run = pool(head).longest_run(keys);
  const std::uint32_t wanted = static_cast<std::uint32_t>(num_segments) - run.length;
  const std::uint32_t available = pool(head).num_available() - run.cached;
  if (wanted <= available) return Ok{};
  return Error{ErrorCode::kExhausted, "head " + std::to_string(head) + " has " +
                                          std::to_string(available) + " slabs to give of " +
                                          std::to_string(pool(head).num_ready()) + " ready ones, " +
                                          std::to_string(wanted) + " wanted"};
}

// One more lease on the slabs of (holder, head); the first one allocates them: the longest run of
// keys that is there, then empty slabs.
void StoreBook::hold(const Holder& holder, int head, std::span<const PrefixKey> keys,
                     int num_segments) {
  Allocation& allocation = allocations_[{holder, head}];
  if (allocation.num_leases++ > 0) return;
  for (const PrefixKey& key : keys) {
    const auto slab = pool(head).find(key);
    if (!slab) break;
    allocation.slabs.push_back(*slab);
  }
  allocation.hits = static_cast<int>(allocation.slabs.size());
  for (int i = allocation.hits; i < num_segments; ++i) {
    const auto slab = pool(head).acquire();
    FT_CHECK(slab.has_value(), head, num_segments, allocation.hits);  // check_room's promise
    allocation.slabs.push_back(*slab);
  }
  num_hits_ += allocation.hits;
  num_misses_ += static_cast<std::int64_t>(keys.size()) - allocation.hits;
}

Result<Grant> StoreBook::use(LeaseId id, SequenceId sequence, int hit_segments) {
  const Lease& lease = at(id);
  const auto found = lease.sequences.find(sequence);
  if (found == lease.sequences.end()) return not_reserved(sequence);
  if (hit_segments < 0) return invalid("hit_segments is negative");
  const Holder& holder = found->second.holder;
  const auto each_head = [&](auto&& act) {
    for (int i = 0; i < lease.owner.num_heads; ++i) {
      const int head = lease.owner.first_head + i;
      act(*find(holder, head), head);
    }
  };
  bool room = true;
  each_head([&](const Allocation& allocation, int head) {
    room = room && num_to_swap(allocation, head, hit_segments) <= pool(head).num_available();
  });
  if (!room) {
    return Error{ErrorCode::kExhausted,
                 "no empty slabs to swap shared ones of " + name_of(sequence) + " for"};
  }
  each_head([&](Allocation& allocation, int head) { trim(allocation, head, hit_segments); });
  return grant_of(lease.owner, holder);
}

// Hits past hit_segments that others read too, so that they can't just be taken over.
std::uint32_t StoreBook::num_to_swap(const Allocation& allocation, int head, int hit_segments) {
  std::uint32_t count = 0;
  for (int i = hit_segments; i < allocation.hits; ++i) {
    if (pool(head).is_shared(allocation.slabs[static_cast<std::size_t>(i)])) ++count;
  }
  return count;
}

// Makes hits past hit_segments private: taken over where nobody else reads them, else swapped.
void StoreBook::trim(Allocation& allocation, int head, int hit_segments) {
  for (; allocation.hits > hit_segments; --allocation.hits) {
    SlabIndex& slab = allocation.slabs[static_cast<std::size_t>(allocation.hits - 1)];
    if (!pool(head).is_shared(slab)) {
      pool(head).unpublish(slab);
      continue;
    }
    const auto fresh = pool(head).acquire();
    FT_CHECK(fresh.has_value(), head, allocation.hits);
    pool(head).release(slab);
    slab = *fresh;
  }
}

Status StoreBook::commit(LeaseId id, SequenceId sequence, int segment, const PrefixKey& key) {
  Lease& lease = at(id);
  const auto found = lease.sequences.find(sequence);
  if (found == lease.sequences.end()) return not_reserved(sequence);
  for (int i = 0; i < lease.owner.num_heads; ++i) {
    const int head = lease.owner.first_head + i;
    const Allocation& allocation = *find(found->second.holder, head);
    if (segment < 0 || static_cast<std::size_t>(segment) >= allocation.slabs.size()) {
      return invalid(name_of(sequence) + " has no segment " + std::to_string(segment));
    }
    pool(head).publish(allocation.slabs[static_cast<std::size_t>(segment)], key);
  }
  found->second.keys.note(segment, key);
  return Ok{};
}

Status StoreBook::distrust(LeaseId id, SequenceId sequence) {
  const Lease& lease = at(id);
  const auto found = lease.sequences.find(sequence);
  if (found == lease.sequences.end()) return not_reserved(sequence);
  for (int i = 0; i < lease.owner.num_heads; ++i) {
    const int head = lease.owner.first_head + i;
    for (const SlabIndex slab : find(found->second.holder, head)->slabs) {
      pool(head).distrust(slab);
    }
  }
  return Ok{};
}

Status StoreBook::release(LeaseId id, SequenceId sequence) {
  Lease& lease = at(id);
  const auto found = lease.sequences.find(sequence);
  if (found == lease.sequences.end()) return not_reserved(sequence);
  drop_all(lease.owner, found->second.holder);
  lease.sequences.erase(found);
  return Ok{};
}

void StoreBook::drop_all(const LeaseOwner& owner, const Holder& holder) {
  for (int i = 0; i < owner.num_heads; ++i) drop(holder, owner.first_head + i);
}

// One lease less. Slabs go back from the last segment to the first, so that of a cached prefix the
// tail is forgotten before what it builds on.
void StoreBook::drop(const Holder& holder, int head) {
  const auto found = allocations_.find({holder, head});
  FT_CHECK(found != allocations_.end(), raw(holder.sequence), head);
  if (--found->second.num_leases > 0) return;
  const std::vector<SlabIndex>& slabs = found->second.slabs;
  for (auto slab = slabs.rbegin(); slab != slabs.rend(); ++slab) pool(head).release(*slab);
  allocations_.erase(found);
}

StoreBook::Allocation* StoreBook::find(const Holder& holder, int head) {
  const auto found = allocations_.find({holder, head});
  return found == allocations_.end() ? nullptr : &found->second;
}

Grant StoreBook::grant_of(const LeaseOwner& owner, const Holder& holder) {
  Grant grant;
  for (int i = 0; i < owner.num_heads; ++i) {
    const Allocation& allocation = *find(holder, owner.first_head + i);
    grant.head_hits.push_back(allocation.hits);
    grant.slabs.insert(grant.slabs.end(), allocation.slabs.begin(), allocation.slabs.end());
  }
  return grant;
}

// ---- the tier below ---------------------------------------------------------------------------

std::optional<PrefixKey> StoreBook::key_before(LeaseId lease, SequenceId sequence, int segment) {
  return at(lease).sequences.at(sequence).keys.before(segment);
}

std::optional<SlabIndex> StoreBook::find_published(int head, const PrefixKey& key) const {
  return pools_[static_cast<std::size_t>(head)].peek(key);
}

std::optional<SlabIndex> StoreBook::refresh(int head, const PrefixKey& key) {
  const auto slab = pool(head).find(key);
  if (slab) pool(head).release(*slab);
  return slab;
}

void StoreBook::distrust_published(int head, const PrefixKey& key) {
  const auto slab = pool(head).find(key);
  if (!slab) return;
  pool(head).distrust(*slab);
  pool(head).release(*slab);
}

// ---- what there is ----------------------------------------------------------------------------

StoreStat StoreBook::stat() const {
  const SlabPool& fullest = *std::ranges::min_element(pools_, {}, &SlabPool::num_available);
  StoreStat stat;
  stat.slabs_total = fullest.num_slabs();
  stat.slabs_ready = fullest.num_ready();
  stat.slabs_free = fullest.num_free();
  stat.slabs_used = fullest.num_used();
  stat.slabs_cached = fullest.num_cached();
  stat.hits = num_hits_;
  stat.misses = num_misses_;
  for (const SlabPool& pool : pools_) {
    stat.evictions += static_cast<std::int64_t>(pool.num_evictions());
  }
  stat.leases = static_cast<std::int64_t>(leases_.size());
  for (const auto& [id, lease] : leases_) {
    stat.sequences += static_cast<std::int64_t>(lease.sequences.size());
  }
  return stat;
}

void StoreBook::check() const {
  for (const SlabPool& pool : pools_) pool.check();
  std::map<std::pair<Holder, int>, int> held;
  for (const auto& [id, lease] : leases_) {
    for (const auto& [name, sequence] : lease.sequences) {
      for (int i = 0; i < lease.owner.num_heads; ++i) {
        ++held[{sequence.holder, lease.owner.first_head + i}];
      }
    }
  }
  FT_CHECK(held.size() == allocations_.size(), held.size(), allocations_.size());
  for (const auto& [place, count] : held) {
    FT_CHECK(allocations_.at(place).num_leases == count, count);
  }
}

}  // namespace foretoken::kvstore
