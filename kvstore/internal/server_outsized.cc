// Server, sequences that are larger than the arena: slabs for some of their KV, slots of the NVMe
// file for all of it. Ranks that share a head have slabs and slots of their own each: which run is
// in memory is known to its rank alone.
#include <algorithm>
#include <limits>
#include <utility>

#include "common/ids.h"
#include "kvstore/internal/server.h"
#include "kvstore/outsized_kv.h"

namespace foretoken::kvstore {
namespace {

// Of what share_of() divides: the sequences of other kinds run in the rest.
constexpr std::uint32_t kNumerator = 3;
constexpr std::uint32_t kDenominator = 4;

Error invalid(std::string message) { return {ErrorCode::kInvalidArgument, std::move(message)}; }

Error unavailable(NvmeState state) {
  return {ErrorCode::kUnavailable, "the sequence is larger than the arena, and the NVMe tier is " +
                                       std::string(nvme_state_name(state)) + "; see the log"};
}

// Slabs a head that make enough frames.
std::uint32_t least_slabs(const kernels::KvShape& shape, int num_segments) {
  const auto layers = static_cast<std::size_t>(shape.num_layers);
  return static_cast<std::uint32_t>((OutsizedKv::least_frames(shape, num_segments) + layers - 1) /
                                    layers);
}

// Of a head's slabs that no outsized sequence has, what the next one is given at most: not all, but
// where two of its kind can run, what the other one needs stays.
std::uint32_t share_of(std::uint32_t left, std::uint32_t least) {
  std::uint32_t share = left * kNumerator / kDenominator;
  if (2 * least <= left) share = std::min(share, left - least);
  return std::max(share, least);
}

bool share_a_head(const LeaseOwner& a, const LeaseOwner& b) {
  return a.first_head < b.first_head + b.num_heads && b.first_head < a.first_head + a.num_heads;
}

}  // namespace

// Of an arena that has settled for fewer slabs than it was to have, those are all.
bool Server::is_outsized(const Reserve& request) const {
  return nvme_file_.has_value() &&
         static_cast<std::uint32_t>(request.num_segments) > book_->slabs_per_head();
}

// Slabs a head for this rank, if all ranks of its group can run it, now or ever.
Result<std::uint32_t> Server::num_slabs_for(const Peer& peer, const Reserve& request) const {
  const Group group = book_->group_of(*peer.lease);
  std::uint32_t num_sharers = 0;  // of a head
  std::size_t num_slots = 0;      // of all ranks
  for (const auto& [lease, owner] : group) {
    if (share_a_head(owner, peer.owner)) ++num_sharers;
    num_slots += static_cast<std::size_t>(owner.num_heads * request.num_segments);
  }
  const std::uint32_t total = book_->slabs_per_head();
  const std::uint32_t least = num_sharers * least_slabs(model_->slab_shape(), request.num_segments);
  if (least > total || num_slots > static_cast<std::size_t>(tier_->stat().slabs_total)) {
    return invalid(std::to_string(request.num_segments) + " segments can never fit: they take " +
                   std::to_string(least) + " slabs a head in memory, and there are " +
                   std::to_string(total) + "; " + std::to_string(num_slots) +
                   " slots on NVMe, and there are " + std::to_string(tier_->stat().slabs_total) +
                   "; raise --kv-host-gib or --kv-nvme-gib");
  }
  const std::uint32_t others = num_slabs_lent(peer, group, request.sequence);
  const std::uint32_t share = share_of(total - std::min(total, others), least);
  const std::uint32_t room = room_for(peer, group, request.sequence);
  const std::uint32_t num_slabs = std::max(least, std::min(share, room)) / num_sharers;
  if (peer.owner.num_heads * (request.num_segments + static_cast<int>(num_slabs)) >
      kMaxGrantSlabs) {
    return invalid(std::to_string(request.num_segments) + " segments of " +
                   std::to_string(peer.owner.num_heads) + " heads are more than can run from NVMe");
  }
  if (!tier_->may_lend(std::chrono::steady_clock::now())) return unavailable(tier_->stat().state);
  if (request.keys.size() > static_cast<std::size_t>(request.num_segments)) {
    return invalid(std::to_string(request.keys.size()) + " keys for " +
                   std::to_string(request.num_segments) + " segments");
  }
  return num_slabs;
}

// Hits are borrowed first, so that they don't give way to what is lent.
Result<Grant> Server::reserve_outsized(const Peer& peer, const Reserve& request) {
  if (!tier_) return unavailable(NvmeState::kOffline);
  FT_ASSIGN_OR_RETURN(const std::uint32_t num_slabs, num_slabs_for(peer, request));
  FT_RETURN_IF_ERROR(book_->can_reserve(*peer.lease, request.sequence, {},
                                        static_cast<int>(num_slabs), SlabsOf::kRank));
  const TimePoint now = std::chrono::steady_clock::now();
  const int found = num_hits(peer, request.keys, now);
  const int hits = reads_outsized(request, found) ? found : 0;
  Lent lent{.slots = {},
            .keys = SegmentKeys(request.keys),
            .num_segments = request.num_segments,
            .hit_segments = hits,
            .owner = peer.owner,
            .num_slabs = num_slabs};
  std::vector<SlotIndex> borrowed;
  for (int head = 0; head < peer.owner.num_heads; ++head) {
    for (const PrefixKey& key : std::span(request.keys).first(static_cast<std::size_t>(hits))) {
      borrowed.push_back(tier_->borrow({peer.owner.first_head + head, key}));
    }
  }
  auto fresh = tier_->lend(
      static_cast<std::size_t>(peer.owner.num_heads * (request.num_segments - hits)), now);
  if (!fresh) {
    tier_->take_back(borrowed);
    return Error{ErrorCode::kExhausted, "no slots are free on NVMe"};
  }
  auto from = borrowed.begin();
  auto more = fresh->begin();
  for (int head = 0; head < peer.owner.num_heads; ++head) {
    for (int i = 0; i < hits; ++i) lent.slots.push_back(*from++);
    for (int i = hits; i < request.num_segments; ++i) lent.slots.push_back(*more++);
  }
  book_->count(std::int64_t{peer.owner.num_heads} * hits,
               std::int64_t{peer.owner.num_heads} * (std::ssize(request.keys) - hits));
  Grant grant = grant_of(lent);
  count_passed_over(peer, ReadChoice::Way::kInPrefill, request.keys, grant.head_hits);
  grant.slabs =
      book_->reserve(*peer.lease, request.sequence, {}, static_cast<int>(num_slabs), SlabsOf::kRank)
          .value()
          .slabs;
  lent_[{*peer.lease, request.sequence}] = std::move(lent);
  return grant;
}

Grant Server::grant_of(const Lent& lent) const {
  Grant grant;
  grant.head_hits.assign(static_cast<std::size_t>(lent.owner.num_heads), lent.hit_segments);
  grant.slots_offset = tier_->slots_offset();
  grant.slots = lent.slots;
  grant.file_id = tier_->file_id();
  return grant;
}

// ---- prefixes ---------------------------------------------------------------------------------

// Leading segments that the file has on all of the rank's heads. What only the arena has is
// written behind, and counts from then on.
int Server::num_hits(const Peer& peer, std::span<const PrefixKey> keys, TimePoint now) const {
  const auto is_there = [&](const PrefixKey& key) {
    for (int i = 0; i < peer.owner.num_heads; ++i) {
      if (!tier_->has({peer.owner.first_head + i, key}, now)) return false;
    }
    return true;
  };
  return static_cast<int>(std::ranges::find_if_not(keys, is_there) - keys.begin());
}

// Hits past what the group agreed on are given back, for empty slots.
Result<Grant> Server::use_outsized(const Peer& peer, const Use& request) {
  Lent& lent = lent_.at({*peer.lease, request.sequence});
  const int fewer = std::max(0, lent.hit_segments - request.hit_segments);
  const auto fresh = tier_->lend(static_cast<std::size_t>(lent.owner.num_heads * fewer),
                                 std::chrono::steady_clock::now());
  if (!fresh) return Error{ErrorCode::kExhausted, "no slots are free on NVMe"};
  std::vector<SlotIndex> unused;
  for (int i = 0; i < lent.owner.num_heads * fewer; ++i) {
    SlotIndex& slot =
        lent.slot(i % lent.owner.num_heads, request.hit_segments + i / lent.owner.num_heads);
    unused.push_back(std::exchange(slot, (*fresh)[static_cast<std::size_t>(i)]));
  }
  tier_->take_back(unused);
  lent.hit_segments -= fewer;
  Grant grant = grant_of(lent);
  grant.slabs = book_->use(*peer.lease, request.sequence, 0).value().slabs;  // as they were
  return grant;
}

Result<Server::Lent*> Server::find_lent(const Peer& peer, SequenceId sequence) {
  const auto found = lent_.find({*peer.lease, sequence});
  if (found != lent_.end()) return &found->second;
  return invalid("sequence " + std::to_string(raw(sequence)) + " does not run from NVMe");
}

Status Server::publish(const Peer& peer, const Publish& request) {
  FT_ASSIGN_OR_RETURN(Lent * lent, find_lent(peer, request.sequence));
  const auto heads = static_cast<std::size_t>(lent->owner.num_heads);
  if (request.segment < lent->hit_segments || request.segment >= lent->num_segments ||
      request.digests.size() != heads ||
      request.seals.size() != (config_.nvme->cipher ? heads : 0)) {
    return invalid("sequence " + std::to_string(raw(request.sequence)) +
                   " publishes what it was not lent");
  }
  lent->keys.note(request.segment, request.key);
  const auto previous = lent->keys.before(request.segment);
  for (std::size_t i = 0; i < heads; ++i) {
    const int head = static_cast<int>(i);
    tier_->publish({lent->owner.first_head + head, request.key},
                   {lent->slot(head, request.segment), request.digests[i],
                    request.seals.empty() ? Seal{} : request.seals[i], previous},
                   std::chrono::steady_clock::now());
  }
  return Ok{};
}

Status Server::refute(const Peer& peer, const Refute& request) {
  FT_ASSIGN_OR_RETURN(Lent * lent, find_lent(peer, request.sequence));
  if (request.head >= lent->owner.num_heads || request.segment >= lent->num_segments) {
    return invalid("sequence " + std::to_string(raw(request.sequence)) +
                   " refutes what it was not lent");
  }
  tier_->refute(lent->slot(request.head, request.segment), std::chrono::steady_clock::now());
  return Ok{};
}

// ---- what they have ---------------------------------------------------------------------------

// Of a head of the peer's, the slabs that outsized sequences hold, other than this one of its
// group.
std::uint32_t Server::num_slabs_lent(const Peer& peer, const Group& group,
                                     SequenceId sequence) const {
  std::uint32_t sum = 0;
  for (const auto& [key, lent] : lent_) {
    const auto& [lease, id] = key;
    const bool is_this = id == sequence && group.contains(lease);
    if (!is_this && share_a_head(lent.owner, peer.owner)) sum += lent.num_slabs;
  }
  return sum;
}

// Of the peer's head that has the fewest, the slabs that nobody has, or this sequence of its group.
// What is not ready yet counts: it is waited for, rather than done without for the whole sequence.
std::uint32_t Server::room_for(const Peer& peer, const Group& group, SequenceId sequence) const {
  std::uint32_t room = std::numeric_limits<std::uint32_t>::max();
  for (int head = peer.owner.first_head; head < peer.owner.first_head + peer.owner.num_heads;
       ++head) {
    std::uint32_t of_head = book_->num_unheld(head);
    for (const auto& [key, lent] : lent_) {
      const bool has_head =
          head >= lent.owner.first_head && head < lent.owner.first_head + lent.owner.num_heads;
      if (key.second == sequence && group.contains(key.first) && has_head)
        of_head += lent.num_slabs;
    }
    room = std::min(room, of_head);
  }
  return room;
}

std::vector<SlotIndex> Server::Lent::by_segment() {
  std::vector<SlotIndex> all;
  for (int segment = 0; segment < num_segments; ++segment) {
    for (int head = 0; head < owner.num_heads; ++head) all.push_back(slot(head, segment));
  }
  return all;
}

// Of one sequence, or of all that the lease has. What a dead rank had under way may still end: it
// fails its check, like any torn write.
void Server::take_back_slots(LeaseId lease, std::optional<SequenceId> sequence) {
  for (auto lent = lent_.begin(); lent != lent_.end();) {
    const auto& [owner, id] = lent->first;
    if (owner != lease || id != sequence.value_or(id)) {
      ++lent;
      continue;
    }
    tier_->take_back(lent->second.by_segment());
    lent = lent_.erase(lent);
  }
}

}  // namespace foretoken::kvstore
