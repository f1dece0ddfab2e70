// Server, sequences that are larger than the arena: slabs for some of their KV, slots of the NVMe
// file for all of it.
#include <algorithm>

#include "kvstore/internal/server.h"
#include "kvstore/outsized_kv.h"

namespace foretoken::kvstore {
namespace {

// Of what share_of() divides: the sequences of other kinds run in the rest.
constexpr std::uint32_t kNumerator = 3;
constexpr std::uint32_t kDenominator = 4;

std::uint32_t divide_up(std::size_t a, std::size_t b) {
  return static_cast<std::uint32_t>((a + b - 1) / b);
}

// Of a head's slabs that no outsized sequence has, what the next one is given: most, but where two
// of its kind can run, what the other one needs stays.
std::uint32_t share_of(std::uint32_t left, std::uint32_t least) {
  std::uint32_t share = left * kNumerator / kDenominator;
  if (2 * least <= left) share = std::min(share, left - least);
  return std::max(share, least);
}

}  // namespace

bool Server::is_outsized(const Reserve& request) const {
  return tier_ != nullptr &&
         static_cast<std::uint32_t>(request.num_segments) > arena_->layout().slabs_per_head;
}

Result<Grant> Server::reserve_outsized(const Peer& peer, const Reserve& request) {
  const kernels::KvShape shape = model_->slab_shape();
  const std::uint32_t total = arena_->layout().slabs_per_head;
  const std::uint32_t least = divide_up(OutsizedKv::least_frames(shape, request.num_segments),
                                        static_cast<std::size_t>(shape.num_layers));
  const auto heads = static_cast<std::size_t>(peer.num_heads);
  const std::size_t num_slots = heads * static_cast<std::size_t>(request.num_segments);
  if (least > total || num_slots > static_cast<std::size_t>(tier_->stat().slabs_total)) {
    return Error{ErrorCode::kInvalidArgument,
                 std::to_string(request.num_segments) + " segments can never fit: they take " +
                     std::to_string(least) + " slabs a head in memory, and there are " +
                     std::to_string(total) + "; " + std::to_string(num_slots) +
                     " slots on NVMe, and there are " + std::to_string(tier_->stat().slabs_total) +
                     "; raise --kv-host-gib or --kv-nvme-gib"};
  }
  const std::uint32_t num_slabs = share_of(total - std::min(total, num_slabs_lent(peer)), least);
  if (num_slots + heads * num_slabs > kMaxGrantSlabs) {
    return Error{ErrorCode::kInvalidArgument, std::to_string(request.num_segments) +
                                                  " segments of " + std::to_string(peer.num_heads) +
                                                  " heads are more than can run from NVMe"};
  }
  if (!tier_->may_lend(std::chrono::steady_clock::now())) {
    return Error{ErrorCode::kUnavailable,
                 "the sequence is larger than the arena, and the NVMe tier is " +
                     std::string(nvme_state_name(tier_->stat().state))};
  }
  if (book_->is_shared(*peer.lease, request.sequence)) {
    return Error{ErrorCode::kInvalidArgument,
                 "ranks that share a KV head can't run a sequence that is larger than the arena"};
  }
  FT_RETURN_IF_ERROR(
      book_->can_reserve(*peer.lease, request.sequence, {}, static_cast<int>(num_slabs)));
  auto slots = tier_->lend(num_slots);
  if (!slots) return Error{ErrorCode::kExhausted, "no slots are free on NVMe"};
  Grant grant =
      book_->reserve(*peer.lease, request.sequence, {}, static_cast<int>(num_slabs)).value();
  grant.slots_offset = tier_->slots_offset();
  grant.slots = *slots;
  lent_[{*peer.lease, request.sequence}] = {*std::move(slots), peer.first_head, peer.num_heads,
                                            num_slabs};
  return grant;
}

// Of a head of the peer's, the slabs that outsized sequences hold.
std::uint32_t Server::num_slabs_lent(const Peer& peer) const {
  std::uint32_t sum = 0;
  for (const auto& [owner, lent] : lent_) {
    const bool has_heads_of_it = lent.first_head < peer.first_head + peer.num_heads &&
                                 peer.first_head < lent.first_head + lent.num_heads;
    if (has_heads_of_it) sum += lent.num_slabs;
  }
  return sum;
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
    tier_->take_back(lent->second.slots);
    lent = lent_.erase(lent);
  }
}

}  // namespace foretoken::kvstore
