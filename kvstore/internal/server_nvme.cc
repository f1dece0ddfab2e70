// Server, its NVMe tier's side: reservations that need it, its start and its end.
#include <poll.h>

#include <algorithm>
#include <utility>

#include "common/ids.h"
#include "common/log.h"
#include "kvstore/internal/server.h"

namespace foretoken::kvstore {
namespace {

using std::chrono::milliseconds;

constexpr std::chrono::seconds kCloseLimit{3};  // `serve` gives a child 5 s to end
constexpr std::chrono::seconds kOpeningPause{60};
constexpr double kShareOfRoom = 0.9;

}  // namespace

// ---- start and end ----------------------------------------------------------------------------

// A tier that can't be opened is tried again when a rank says hello, but not at once: a disk that
// hangs takes 11 s to say so, and the other ranks of a group wait here.
void Server::open_tier() {
  const auto room = static_cast<double>(nvme_file_->room_bytes());
  auto tier = NvmeTier::open(*nvme_file_, {*model_, config_.nvme->capacity_bytes,
                                           static_cast<std::uint64_t>(kShareOfRoom * room),
                                           config_.nvme->reuse, config_.nvme->cipher});
  if (!tier) {
    next_opening_ = std::chrono::steady_clock::now() + kOpeningPause;
    return log().error("no NVMe tier: {}", tier.error().message);
  }
  tier_ = *std::move(tier);
  const ArenaLayout& layout = arena_->layout();
  mover_ = std::make_unique<TierMover>(
      *book_, *tier_, [this](int head, SlabIndex slab) { return arena_->slab(head, raw(slab)); },
      std::size_t{layout.slabs_per_head} * static_cast<std::size_t>(layout.num_kv_heads));
  promotions_ = std::make_unique<Promotions>(*book_, *mover_, choice_, layout.num_kv_heads);
  watch(mover_->completion_fd(), kNvme);
}

// To a rank of ours, which has the arena's memory already.
bool Server::hand_over_key(const Peer& peer) const {
  if (!config_.nvme || !config_.nvme->cipher) {
    return reply(peer, Error{ErrorCode::kInvalidArgument, "NVMe is not encrypted"});
  }
  const auto pipe = config_.nvme->cipher->hand_over();
  if (!pipe) return reply(peer, pipe.error());
  return reply(peer, FileKey{config_.nvme->cipher->kind()}, pipe->get());
}

// What is to be kept and waits to be written is written now, as far as the time goes.
void Server::close_tier() {
  if (!nvme_file_) return;
  if (config_.nvme->reuse == NvmeReuse::kStartAfresh) return nvme_file_->remove();
  const TimePoint end = std::chrono::steady_clock::now() + kCloseLimit;
  for (TimePoint now{}; mover_ && now < end; now = std::chrono::steady_clock::now()) {
    if (mover_->finish(std::chrono::steady_clock::now())) return;
    pollfd ready{mover_->completion_fd(), POLLIN, 0};
    if (!mover_->has_more(std::chrono::steady_clock::now())) poll(&ready, 1, 10);
  }
}

// ---- reservations -----------------------------------------------------------------------------

// What is under way comes before what there is room for: it may hold the very slabs that this
// reservation is to get. Nothing is started for one that could not be granted.
bool Server::is_coming(const Peer& peer, const Reserve& request) {
  const TimePoint now = std::chrono::steady_clock::now();
  if (!promotions_->is_under_way(request.keys, now) &&
      !book_->can_reserve(*peer.lease, request.sequence, request.keys, request.num_segments)) {
    return false;
  }
  return promotions_->is_coming(peer.owner.first_head, peer.owner.num_heads, request.keys, now);
}

// For a sequence that is larger than the arena: on all heads of the rank, `hits` segments are
// there.
bool Server::reads_outsized(const Reserve& request, int hits) {
  if (hits == 0) return true;
  const double tokens = static_cast<double>(hits) * kSegmentTokens;
  return choice_.reads(request.keys.back(), ReadChoice::Way::kInPrefill, {tokens, tokens},
                       std::chrono::steady_clock::now());
}

// What a reservation was granted without, although its file has it: of a group, by its first rank.
void Server::count_passed_over(const Peer& peer, ReadChoice::Way way,
                               std::span<const PrefixKey> keys, std::span<const int> head_hits) {
  const TimePoint now = std::chrono::steady_clock::now();
  if (peer.owner.rank > 0 || keys.empty() || !choice_.is_passed_over(keys.back(), way, now)) return;
  const auto rest = keys.subspan(static_cast<std::size_t>(std::ranges::min(head_hits)));
  const auto is_there = [&](const PrefixKey& key) {
    for (int i = 0; i < peer.owner.num_heads; ++i) {
      const SlabName name{peer.owner.first_head + i, key};
      if (mover_->place_of(name, now) != TierMover::Place::kFile) return false;
    }
    return true;
  };
  tokens_passed_over_ += kSegmentTokens * (std::ranges::find_if_not(rest, is_there) - rest.begin());
}

// A prefix is used from its beginning, so its end is to give way first. A group's first rank says
// so for all heads: else those of the rank that asks first would give way before the others'.
void Server::touch_prefix(const Peer& peer, std::span<const PrefixKey> keys) {
  if (peer.owner.rank > 0) return;
  for (auto key = keys.rbegin(); key != keys.rend(); ++key) {
    for (int head = 0; head < model_->total_kv_heads; ++head) tier_->touch({head, *key});
  }
  tier_->note_use(keys);
}

void Server::note_prefill(const PrefillTimes& times) {
  const double layers = model_->num_layers;
  choice_.on_computed(static_cast<double>(times.computed) / layers, times.computing);
  choice_.on_read(ReadChoice::Way::kInPrefill, static_cast<double>(times.read) / layers,
                  times.reading);
}

void Server::advance_tier() {
  const TimePoint now = std::chrono::steady_clock::now();
  for (const SlabName& name : mover_->advance(now)) promotions_->on_ended(name, now);
  promotions_->forget_late(now);
}

int Server::wait_ms() const {
  if (!mover_) return -1;
  if (mover_->has_more(std::chrono::steady_clock::now())) return 0;
  std::optional<TimePoint> next = mover_->deadline();
  if (const auto late = promotions_->deadline()) next = std::min(next.value_or(*late), *late);
  if (!next) return -1;
  const auto left = std::chrono::ceil<milliseconds>(*next - std::chrono::steady_clock::now());
  return static_cast<int>(std::max<std::int64_t>(0, left.count()));
}

}  // namespace foretoken::kvstore
