// Server, its NVMe tier's side: reservations that wait for it, its start and its end.
#include <poll.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "common/ids.h"
#include "common/log.h"
#include "kvstore/internal/server.h"

namespace foretoken::kvstore {
namespace {

using std::chrono::milliseconds;

constexpr std::chrono::seconds kPromotionLimit{20};  // a rank gives a request 30 s
constexpr std::chrono::seconds kCloseLimit{3};       // `serve` gives a child 5 s to end
constexpr double kShareOfRoom = 0.9;

}  // namespace

// ---- start and end ----------------------------------------------------------------------------

// A tier that can't be opened is tried again when the next rank says hello.
void Server::open_tier() {
  const auto room = static_cast<double>(nvme_file_->room_bytes());
  auto tier = NvmeTier::open(
      *nvme_file_, {*model_, config_.nvme->capacity_bytes,
                    static_cast<std::uint64_t>(kShareOfRoom * room), config_.nvme->reuse});
  if (!tier) return log().error("no NVMe tier: {}", tier.error().message);
  tier_ = *std::move(tier);
  const ArenaLayout& layout = arena_->layout();
  mover_ = std::make_unique<TierMover>(
      *book_, *tier_, [this](int head, SlabIndex slab) { return arena_->slab(head, raw(slab)); },
      std::size_t{layout.slabs_per_head} * static_cast<std::size_t>(layout.num_kv_heads));
  watch(mover_->completion_fd(), kNvme);
}

// What is to be kept and waits to be written is written now, as far as the time goes.
void Server::close_tier() {
  if (!nvme_file_) return;
  if (config_.nvme->reuse == NvmeReuse::kStartAfresh) return nvme_file_->remove();
  const TimePoint end = std::chrono::steady_clock::now() + kCloseLimit;
  for (TimePoint now{}; mover_ && now < end; now = std::chrono::steady_clock::now()) {
    static_cast<void>(mover_->advance(std::chrono::steady_clock::now()));
    if (mover_->is_idle(std::chrono::steady_clock::now())) return;
    pollfd ready{mover_->completion_fd(), POLLIN, 0};
    if (!mover_->has_more(std::chrono::steady_clock::now())) poll(&ready, 1, 10);
  }
}

// ---- reservations -----------------------------------------------------------------------------

// False: there is nothing to wait for.
bool Server::promote(PeerId id, const Peer& peer, const Reserve& request) {
  if (!book_->can_reserve(*peer.lease, request.sequence, request.keys, request.num_segments)) {
    return false;
  }
  const TimePoint now = std::chrono::steady_clock::now();
  auto awaited = mover_->promote(peer.first_head, peer.num_heads, request.keys, now);
  if (awaited.empty()) return false;
  pending_.push_back({id, request, std::move(awaited), now + kPromotionLimit});
  return true;
}

void Server::forget_pending(PeerId id) {
  std::erase_if(pending_, [id](const Pending& pending) { return pending.peer == id; });
}

void Server::advance_tier() {
  const TimePoint now = std::chrono::steady_clock::now();
  for (const SlabName& name : mover_->advance(now)) {
    for (Pending& pending : pending_) pending.awaited.erase(name);
  }
  answer_pending(now);
}

void Server::answer_pending(TimePoint now) {
  const auto is_due = [now](const Pending& pending) {
    return pending.awaited.empty() || now >= pending.deadline;
  };
  std::vector<Pending> due;
  std::ranges::copy_if(pending_, std::back_inserter(due), is_due);
  std::erase_if(pending_, is_due);
  for (const Pending& pending : due) {
    if (!grant(peers_.at(pending.peer), pending.request)) drop(pending.peer);
  }
}

int Server::wait_ms() const {
  if (!mover_) return -1;
  if (mover_->has_more(std::chrono::steady_clock::now())) return 0;
  std::optional<TimePoint> next = mover_->deadline();
  for (const Pending& pending : pending_)
    next = std::min(next.value_or(pending.deadline), pending.deadline);
  if (!next) return -1;
  const auto left = std::chrono::ceil<milliseconds>(*next - std::chrono::steady_clock::now());
  return static_cast<int>(std::max<std::int64_t>(0, left.count()));
}

}  // namespace foretoken::kvstore
