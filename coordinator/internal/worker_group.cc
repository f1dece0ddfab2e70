#include "coordinator/worker_group.h"

#include <algorithm>

#include "common/check.h"
#include "common/log.h"

namespace foretoken::coordinator {

using Events = std::vector<GroupEvent>;

void WorkerGroup::begin_epoch(Epoch epoch) {
  if (const auto ended = life(); ended && *ended > 0) dead_life_ = ended;
  epoch_ = epoch;
  ready_ = false;
  due_.clear();
  std::fill(ranks_.begin(), ranks_.end(), Rank{});
}

WorkerGroup::Rank* WorkerGroup::find(const std::string& peer, Epoch epoch, int rank) {
  if (epoch != epoch_ || rank < 0 || rank >= static_cast<int>(ranks_.size())) return nullptr;
  auto& found = ranks_[static_cast<std::size_t>(rank)];
  return found.hello && found.peer == peer ? &found : nullptr;
}

GroupDead WorkerGroup::dead(ErrorCode code, int rank, const std::string& why,
                            bool must_be_killed) const {
  std::string who = "rank " + std::to_string(rank);
  if (rank >= 0 && rank < static_cast<int>(ranks_.size())) {
    if (const auto& hello = ranks_[static_cast<std::size_t>(rank)].hello) {
      who += " (pid " + std::to_string(hello->pid) + " on " + hello->host + ")";
    }
  }
  return {{code, who + " of group " + std::to_string(group_) + " " + why}, must_be_killed};
}

Events WorkerGroup::on_hello(const std::string& peer, const Hello& hello) {
  if (hello.world_size != static_cast<int>(ranks_.size()) || hello.rank < 0 ||
      hello.rank >= hello.world_size) {
    log().error("rank {} of {} said hello to group {}, which has {} ranks: not welcome", hello.rank,
                hello.world_size, group_, ranks_.size());
    return {};
  }
  const auto known = life();
  const bool is_dead = hello.life > 0 && dead_life_ && hello.life <= *dead_life_;
  if (is_dead || (known && hello.life < *known)) {
    log().info("rank {} of group {} said hello, of a life that is over", hello.rank, group_);
    return {};
  }
  if (ready_ || (known && hello.life > *known)) {
    // Its parent has started the group anew: the one we knew is no more.
    return {dead(ErrorCode::kUnavailable, hello.rank, "was started again",
                 /*must_be_killed=*/false)};
  }
  auto& rank = ranks_[static_cast<std::size_t>(hello.rank)];
  rank = Rank{};
  rank.peer = peer;
  rank.hello = hello;
  rank.heard = watched_ + kFirstHeartbeat;
  return {SendWelcome{peer}};
}

Events WorkerGroup::on_ready(const std::string& peer, const Ready& ready) {
  auto* rank = find(peer, ready.epoch, ready.rank);
  if (rank == nullptr || rank->ready) return {};
  rank->ready = ready;
  rank->heard = watched_;
  kv_slabs_ = ready.kv_slabs;
  if (!std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.ready; })) return {};
  for (const auto& other : ranks_) {
    if (other.ready->model_hash != capacity().model_hash) {
      return {dead(ErrorCode::kModelFile, other.ready->rank, "has another model than rank 0",
                   /*must_be_killed=*/true)};
    }
  }
  ready_ = true;
  return {GroupReady{}};
}

// Each rank counts the node's slabs after its own part of the step, which may be before another
// rank's part. The last one's count is wanted: after admissions it has the least room, after
// releases alone the most.
void WorkerGroup::take_slabs(const std::vector<StepResult>& ranks) {
  const bool admits =
      std::ranges::any_of(ranks, [](const StepResult& rank) { return !rank.admits.empty(); });
  const auto room = [](const KvSlabs& slabs) { return slabs.free + slabs.cached; };
  std::optional<KvSlabs> last;
  for (const StepResult& rank : ranks) {
    if (!rank.kv_slabs) continue;
    const bool is_later =
        !last || (admits ? room(*rank.kv_slabs) < room(*last) : room(*rank.kv_slabs) > room(*last));
    if (is_later) last = rank.kv_slabs;
  }
  if (last) kv_slabs_ = *last;
}

Events WorkerGroup::on_result(const std::string& peer, StepResult result) {
  auto* rank = find(peer, result.epoch, result.rank);
  if (rank == nullptr) return {};
  rank->heard = watched_;
  const auto due = due_.find(result.step);
  if (due == due_.end() || due->second.results.contains(result.rank)) {
    return {dead(ErrorCode::kInternal, result.rank,
                 "answered step " + std::to_string(raw(result.step)) + ", which is not due",
                 /*must_be_killed=*/true)};
  }
  auto& results = due->second.results;
  results.emplace(result.rank, std::move(result));
  Events events;
  while (!due_.empty() && due_.begin()->second.results.size() == ranks_.size()) {
    StepDone done;
    for (auto& [number, part] : due_.begin()->second.results) done.ranks.push_back(std::move(part));
    take_slabs(done.ranks);
    due_.erase(due_.begin());
    // Ranks turn to the next plan now, however long ago it was sent.
    if (!due_.empty()) due_.begin()->second.since = watched_;
    events.push_back(std::move(done));
  }
  return events;
}

bool WorkerGroup::on_heartbeat(const Heartbeat& heartbeat) {
  // Heartbeats have a connection of their own, so the peer is not the one that said hello.
  if (heartbeat.epoch != epoch_ || heartbeat.rank < 0 ||
      heartbeat.rank >= static_cast<int>(ranks_.size())) {
    return false;
  }
  auto& rank = ranks_[static_cast<std::size_t>(heartbeat.rank)];
  if (!rank.hello) return false;
  if (rank.suspected) log().info("rank {} of group {} is heard again", heartbeat.rank, group_);
  rank.suspected = false;
  rank.heard = watched_;
  return true;
}

Events WorkerGroup::on_failed(const std::string& peer, const WorkerFailed& failed) {
  if (find(peer, failed.epoch, failed.rank) == nullptr) return {};
  return {dead(failed.error.code, failed.rank, "failed: " + failed.error.message,
               /*must_be_killed=*/false)};
}

GroupDead WorkerGroup::on_unsent(const std::string& peer, const Error& error) const {
  const auto rank = std::find_if(ranks_.begin(), ranks_.end(),
                                 [&](const Rank& r) { return r.hello && r.peer == peer; });
  FT_CHECK(rank != ranks_.end(), peer.size());
  const int number = static_cast<int>(rank - ranks_.begin());
  if (error.code == ErrorCode::kNotFound) {
    return dead(ErrorCode::kUnavailable, number, "is gone: its connection is closed",
                /*must_be_killed=*/false);
  }
  return dead(ErrorCode::kUnavailable, number, "can't be sent to: " + error.message,
              /*must_be_killed=*/true);
}

Events WorkerGroup::on_time(TimePoint now) {
  if (last_look_) watched_ += std::min<Duration>(now - *last_look_, kLongestLook);
  last_look_ = now;
  Events events;
  for (std::size_t i = 0; i < ranks_.size(); ++i) {
    auto& rank = ranks_[i];
    if (!rank.hello) continue;
    const auto silence = watched_ - rank.heard;
    if (silence >= kFenceAfter) {
      return {dead(ErrorCode::kUnavailable, static_cast<int>(i), "was silent for 3 s",
                   /*must_be_killed=*/true)};
    }
    if (silence >= kSuspectAfter) {
      if (!rank.suspected) log().warn("rank {} of group {} is silent for 1 s", i, group_);
      rank.suspected = true;
      events.push_back(SendWelcome{rank.peer});
    }
  }
  if (!due_.empty() && watched_ - due_.begin()->second.since >= kStepTimeout) {
    return {GroupDead{{ErrorCode::kTimeout,
                       "group " + std::to_string(group_) + " took more than 120 s for a step"},
                      /*must_be_killed=*/true}};
  }
  return events;
}

std::optional<int> WorkerGroup::life() const {
  const auto joined =
      std::ranges::find_if(ranks_, [](const Rank& rank) { return rank.hello.has_value(); });
  if (joined == ranks_.end()) return std::nullopt;
  return joined->hello->life;
}

std::vector<std::string> WorkerGroup::peers() const {
  std::vector<std::string> peers;
  for (const auto& rank : ranks_) {
    if (rank.hello) peers.push_back(rank.peer);
  }
  return peers;
}

std::int64_t WorkerGroup::context() const {
  FT_CHECK(ready_);
  const auto least = std::min_element(
      ranks_.begin(), ranks_.end(),
      [](const Rank& a, const Rank& b) { return a.ready->max_model_len < b.ready->max_model_len; });
  return least->ready->max_model_len;
}

std::int64_t WorkerGroup::device_bytes_free() const {
  FT_CHECK(ready_);
  const auto free = [](const Rank& rank) { return rank.ready->device_bytes_free; };
  return free(*std::ranges::min_element(ranks_, {}, free));
}

std::string WorkerGroup::describe() const {
  const auto count = [this](auto has) {
    return std::to_string(std::count_if(ranks_.begin(), ranks_.end(), has));
  };
  const auto total = std::to_string(ranks_.size());
  const auto hellos = count([](const Rank& rank) { return rank.hello.has_value(); });
  if (hellos != total) return hellos + " of " + total + " ranks have joined";
  return count([](const Rank& rank) { return rank.ready.has_value(); }) + " of " + total +
         " ranks have loaded the model";
}

}  // namespace foretoken::coordinator
