// Service, its groups' side: ranks' messages come in, plans go out.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "common/log.h"
#include "common/wire.h"
#include "coordinator/service.h"

namespace foretoken::coordinator {
namespace {

constexpr std::chrono::milliseconds kRetryFull{1000};   // a group that had no room
constexpr std::chrono::milliseconds kRetryFilling{50};  // a group whose store makes more right now
// Between tries of a prompt whose prefix comes from NVMe. A try carries the prompt's tokens, and
// lets a device idle: the pause is a part of the time since the first one, but some of what a try
// takes, so that others are tried in between (guessed).
constexpr std::chrono::milliseconds kMinPause{2};
constexpr std::chrono::milliseconds kMaxPause{400};
constexpr int kPausesInTime = 16;
constexpr int kTriesInPause = 4;
// With a parent that saw the death itself: more than its longest pause before a restart (8 s) and
// the start of MPI take together.
constexpr std::chrono::seconds kRestartPatience{20};
// With the start of a life that was asked for: a machine under load, a slow file system.
constexpr std::chrono::seconds kStartPatience{60};
constexpr int kMaxLosses = 3;  // of a request's KV, before it is told
constexpr int kMaxDeaths = 3;  // of groups under a request, before it counts as their cause
// Of a request that has a group to itself, one a second: other groups of the node, or a dead rank
// whose exit is awaited, may hold the room.
constexpr int kMaxRefusals = 120;

std::optional<std::chrono::milliseconds> max_inter_token(const ServiceConfig& config) {
  if (config.max_inter_token_ms == 0) return std::nullopt;
  return std::chrono::milliseconds(config.max_inter_token_ms);
}

double seconds(TimePoint::duration time) { return std::chrono::duration<double>(time).count(); }

}  // namespace

// ---- what ranks say --------------------------------------------------------------------------

void Service::on_worker_frame(const RouterFrame& frame, TimePoint now) {
  const auto message = decode_worker_message(frame.body);
  if (!message) return log().error("a rank sent what can't be read: {}", message.error().message);
  std::visit([&](const auto& m) { on_message(frame.peer, m, now); }, *message);
  pump(now);
}

Service::Group* Service::find_group(int number) {
  if (number >= 0 && number < static_cast<int>(groups_.size())) {
    return groups_[static_cast<std::size_t>(number)].get();
  }
  log().error("a rank speaks of group {}; there are {}", number, groups_.size());
  return nullptr;
}

void Service::on_message(const std::string& peer, const Hello& hello, TimePoint now) {
  auto* group = find_group(hello.group);
  if (group == nullptr) return turn_away(peer);
  const auto epoch = group->ranks.epoch();
  const auto events = group->ranks.on_hello(peer, hello);
  if (events.empty()) return turn_away(peer);
  on_events(*group, events, now);
  if (group->ranks.epoch() != epoch) on_events(*group, group->ranks.on_hello(peer, hello), now);
  group->kill_at.reset();
  // Its other ranks are as near as this one, or will never come.
  if (!group->ranks.is_assembled()) group->kill_at = now + kRestartPatience;
}

// A rank that is not welcome. It ends, and says so.
void Service::turn_away(const std::string& peer) {
  static_cast<void>(outbox_.to_worker(peer, encode(CoordinatorMessage(Shutdown{}))));
}

void Service::on_message(const std::string& peer, const Ready& ready, TimePoint now) {
  if (auto* group = find_group(ready.group)) {
    on_events(*group, group->ranks.on_ready(peer, ready), now);
  }
}
void Service::on_message(const std::string& peer, const StepResult& result, TimePoint now) {
  if (auto* group = find_group(result.group)) {
    on_events(*group, group->ranks.on_result(peer, result), now);
  }
}
// A rank that is not, or no longer, one of a group gets no answer: it ends by itself.
void Service::on_message(const std::string& peer, const Heartbeat& heartbeat, TimePoint) {
  auto* group = find_group(heartbeat.group);
  if (group == nullptr || !group->ranks.on_heartbeat(heartbeat)) return;
  // Where it is gone meanwhile, its silence will tell.
  static_cast<void>(outbox_.to_worker(peer, encode(CoordinatorMessage(HeartbeatEcho{}))));
}
void Service::on_message(const std::string& peer, const WorkerFailed& failed, TimePoint now) {
  if (auto* group = find_group(failed.group)) {
    on_events(*group, group->ranks.on_failed(peer, failed), now);
  }
}

void Service::on_events(Group& group, const std::vector<GroupEvent>& events, TimePoint now) {
  const auto epoch = group.ranks.epoch();
  for (const auto& event : events) {
    if (group.ranks.epoch() != epoch) return;  // it died over an earlier one
    std::visit([&](const auto& e) { on_event(group, e, now); }, event);
  }
}

// ---- a group's life --------------------------------------------------------------------------

void Service::on_event(Group& group, const SendWelcome& event, TimePoint now) {
  const Welcome welcome{group.ranks.epoch(), to_json(parts_.config), parts_.store_socket};
  const auto sent = outbox_.to_worker(event.peer, encode(CoordinatorMessage(welcome)));
  if (sent || !group.ranks.is_ready()) return;
  on_event(group, group.ranks.on_unsent(event.peer, sent.error()), now);
}

void Service::on_event(Group& group, const GroupReady&, TimePoint) {
  group.was_ready = true;
  group.last_death.clear();
  group.full_until.reset();
  const auto& ready = group.ranks.capacity();
  group.scheduler =
      std::make_unique<Scheduler>(SchedulerConfig{.epoch = group.ranks.epoch(),
                                                  .num_layers = parts_.model.num_layers,
                                                  .max_num_seqs = parts_.config.max_num_seqs,
                                                  .max_batched_tokens = ready.max_batched_tokens,
                                                  .max_inter_token = max_inter_token(parts_.config),
                                                  .attention_tokens = parts_.model.attention_tokens,
                                                  .spills = parts_.config.kv_policy == "auto"});
  log().info(
      "group {} ready: epoch {}, {}, context {}, {} prefill tokens a step, {} KV slabs a head",
      group.ranks.group(), raw(group.ranks.epoch()), ready.device, group.ranks.context(),
      ready.max_batched_tokens, group.ranks.kv_slabs().total);
  metrics_.set_device_free(group.ranks.group(), group.ranks.device_bytes_free());
  take_slabs(group.ranks.kv_slabs());
}

void Service::take_slabs(const KvSlabs& slabs) {
  slabs_ = slabs;
  metrics_.set_kv(slabs.total, slabs.free, slabs.cached);
  metrics_.set_nvme(slabs.nvme);
}

void Service::on_event(Group& group, const GroupDead& event, TimePoint now) {
  log().error("group {} is dead in epoch {}: {}", group.ranks.group(), raw(group.ranks.epoch()),
              event.error.message);
  group.last_death = event.error.message;
  const auto life = group.ranks.life();
  group.ranks.begin_epoch(Epoch{raw(group.ranks.epoch()) + 1});
  ++restarts_;
  metrics_.on_restart();
  metrics_.set_device_free(group.ranks.group(), std::nullopt);
  requeue(group, now);
  group.scheduler.reset();
  group.kill_at = now + kRestartPatience;
  if (event.must_be_killed) {
    ask_for_restart(group, life, now);
  } else {
    tell_parent("group_dead", group, life);
  }
}

// Again, where nobody comes of the life that is begun then.
void Service::ask_for_restart(Group& group, std::optional<int> life, TimePoint now) {
  group.kill_at = now + kStartPatience;
  tell_parent("restart_group", group, life);
}

void Service::tell_parent(const char* event, const Group& group, std::optional<int> life) {
  nlohmann::json line = {
      {"event", event}, {"group", group.ranks.group()}, {"epoch", raw(group.ranks.epoch())}};
  if (life) line["life"] = *life;
  if (!group.last_death.empty()) line["reason"] = group.last_death;
  outbox_.to_parent(line.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
}

// Its requests go on elsewhere or later.
void Service::requeue(Group& group, TimePoint now) {
  std::vector<Request*> affected;
  for (auto& [id, request] : requests_) {
    const bool known = request->state() == RequestState::kRunning ||
                       (request->state() == RequestState::kFinishing && !request->report);
    if (known && request->group() == group.ranks.group()) affected.push_back(request.get());
  }
  for (auto* request : affected) {
    if (request->state() == RequestState::kFinishing) {
      by_sequence_.erase(request->sequence());
      complete(*request, {}, now);
      continue;
    }
    wait_again(*request);
    if (++request->deaths < kMaxDeaths) continue;
    fail(*request,
         {ErrorCode::kInternal, "its worker group died " + std::to_string(kMaxDeaths) +
                                    " times while it ran; last: " + group.last_death},
         now);
  }
}

// Its sequence is gone. It waits at the place that its arrival gives it.
void Service::wait_again(Request& request) {
  by_sequence_.erase(request.sequence());
  request.pending_since.reset();
  request.wait_again();
  waiting_.insert(request.origin().id);
}

// ---- a step's results ------------------------------------------------------------------------

void Service::on_event(Group& group, const StepDone& done, TimePoint now) {
  auto events = group.scheduler->on_results(done.ranks);
  if (!events) return on_event(group, GroupDead{events.error(), /*must_be_killed=*/true}, now);
  std::int64_t slowest_us = 0;
  for (const auto& rank : done.ranks) slowest_us = std::max(slowest_us, rank.step_us);
  group.last_step = std::chrono::microseconds(slowest_us);
  metrics_.on_step(static_cast<double>(slowest_us) * 1e-6);
  if (std::ranges::any_of(done.ranks,
                          [](const StepResult& rank) { return rank.kv_slabs.has_value(); })) {
    take_slabs(group.ranks.kv_slabs());
  }
  const auto fullest = std::ranges::min_element(done.ranks, {}, &StepResult::device_bytes_free);
  metrics_.set_device_free(group.ranks.group(), fullest->device_bytes_free);
  const auto epoch = group.ranks.epoch();
  for (const auto& event : *events) {
    std::visit([&](const auto& e) { on_step_event(group, e, now); }, event);
    if (group.ranks.epoch() != epoch) return;
  }
}

void Service::on_step_event(Group& group, const LateStep& late, TimePoint) {
  metrics_.on_late_step();
  log().debug(
      "step {} of group {} took {} us, more than --max-inter-token-ms: {} sequences decode, {:.0f} "
      "units of prefill, {} admitted, {} started, {} released; rank {} launched steps for {} us",
      raw(late.step), group.ranks.group(), late.time.count(), late.num_decodes, late.prefill_units,
      late.num_admitted, late.num_started, late.num_released, late.rank, late.launching.count());
}

void Service::on_step_event(Group&, const Admitted& event, TimePoint now) {
  const auto found = by_sequence_.find(event.sequence);
  if (found == by_sequence_.end()) return;
  auto& request = *find(found->second);
  request.was_refused = false;
  request.on_admitted(event.reused_tokens, now);
  if (!request.tokens().empty()) note_continued(request, event.reused_tokens);
}

// After its group's death, or the loss of its KV.
void Service::note_continued(const Request& request, std::int64_t reused_tokens) {
  const std::int64_t again = request.length() - reused_tokens;
  metrics_.on_continued(again);
  log().info("request {} goes on after {} tokens: {} of {} tokens are computed again",
             raw(request.origin().id), request.tokens().size(), again, request.length());
}

void Service::on_step_event(Group& group, const NotAdmitted& event, TimePoint now) {
  const auto found = by_sequence_.find(event.sequence);
  if (found == by_sequence_.end()) return;
  auto& request = *find(found->second);
  const TimePoint pending_since = request.pending_since.value_or(now);
  wait_again(request);
  if (event.error.code == ErrorCode::kPending) return wait_for_prefix(request, pending_since, now);
  const bool filling = group.ranks.store_fills();
  // Nothing else runs that could make room. A device is its group's: what is on it is being let go.
  const bool alone = by_sequence_.empty();
  if (alone && !filling) request.refusals += event.device_is_full ? kMaxRefusals / 4 : 1;
  const bool never_fits =
      parts_.config.kv_nvme_path.empty() &&
      segments_for(request.length() + request.tokens_left()) > group.ranks.kv_slabs().total;
  if (event.error.code != ErrorCode::kExhausted || never_fits || request.refusals >= kMaxRefusals) {
    return fail(request, event.error, now);
  }
  request.was_refused = !alone && !filling;
  group.full_until = now + (filling ? kRetryFilling : kRetryFull);
}

// Its prefix comes from NVMe; others may overtake it meanwhile. The store bounds how often it says
// so.
void Service::wait_for_prefix(Request& request, TimePoint since, TimePoint now) {
  request.pending_since = since;
  const TimePoint::duration pause =
      std::max((now - since) / kPausesInTime, kTriesInPause * (now - request.tried_at));
  request.retry_at = now + std::clamp<TimePoint::duration>(pause, kMinPause, kMaxPause);
}

// KV that failed its check is computed anew, from the prompt and the tokens that there are. A disk
// that fails would fail again.
void Service::on_step_event(Group&, const Lost& event, TimePoint now) {
  const auto found = by_sequence_.find(event.sequence);
  if (found == by_sequence_.end()) return;
  auto& request = *find(found->second);
  wait_again(request);
  if (event.error.code != ErrorCode::kDevice) metrics_.on_lost(event.checksum_failures);
  if (event.error.code != ErrorCode::kCorrupt) return fail(request, event.error, now);
  if (++request.losses >= kMaxLosses) {
    return fail(request,
                {ErrorCode::kCorrupt, "its KV was lost " + std::to_string(kMaxLosses) +
                                          " times, last as " + event.error.message +
                                          "; the node's memory or its disk may be bad"},
                now);
  }
  log().warn("request {}, after {} tokens: {}; it is computed anew", raw(request.origin().id),
             request.tokens().size(), event.error.message);
}

void Service::on_step_event(Group& group, const Sampled& event, TimePoint now) {
  const auto found = by_sequence_.find(event.sequence);
  if (found == by_sequence_.end()) return;
  auto& request = *find(found->second);
  request.refusals = 0;
  // A request that finished over an earlier token of this very step has no further one.
  const auto last = request.last_token_at();
  if (!request.accept(event.position, event.token, parts_.model.eos_ids, now)) {
    const Error error{ErrorCode::kInternal, "a rank sent position " +
                                                std::to_string(event.position) + ", due was " +
                                                std::to_string(request.length())};
    return on_event(group, GroupDead{error, /*must_be_killed=*/true}, now);
  }
  if (last) {
    request.note_step(group.last_step);
    metrics_.on_next_token(seconds(now - *last));
  } else {
    metrics_.on_first_token(seconds(now - request.origin().arrival));
  }
  publish_generated(group, request);
  deliver(request, now);
  if (request.state() == RequestState::kFinishing) settle(request, now);
}

void Service::on_step_event(Group& group, const Released& event, TimePoint now) {
  group.full_until.reset();
  metrics_.on_released(event.kv);
  const auto found = by_sequence_.find(event.sequence);
  if (found == by_sequence_.end()) return;
  auto& request = *find(found->second);
  by_sequence_.erase(found);
  complete(request, event.kv, now);
}

// ---- prefixes --------------------------------------------------------------------------------

// The compute tag "dense" holds for prompts under every policy, for all tokens under `full`, and
// under `auto` for those of a sequence that has not spilled.
void Service::extend_keys(const Group& group, Request& request, std::size_t num_segments) const {
  auto& keys = request.segment_keys;
  if (keys.size() >= num_segments) return;
  const auto ids = request.sequence_tokens();
  auto parent = keys.empty() ? root_key(parts_.tenant_secret + "\n" + request.origin().tenant,
                                        group.ranks.capacity().model_hash, parts_.model.kv_type)
                             : keys.back();
  while (keys.size() < num_segments) {
    parent = prefix_key(parent, "dense",
                        std::span(ids).subspan(keys.size() * kSegmentTokens, kSegmentTokens));
    keys.push_back(parent);
  }
}

// The KV of a segment is complete when the token after it was sampled.
void Service::publish_generated(Group& group, Request& request) {
  const auto before = request.length() - 1;
  const auto& policy = parts_.config.kv_policy;
  const bool dense =
      policy == "full" || (policy == "auto" && group.scheduler->is_dense(request.sequence()));
  if (!dense || before % kSegmentTokens != 0) return;
  const auto segments = static_cast<std::size_t>(before / kSegmentTokens);
  if (segments <= request.segments_given) return;
  extend_keys(group, request, segments);
  group.scheduler->publish(
      {request.sequence(), static_cast<int>(segments) - 1, request.segment_keys[segments - 1]});
}

// ---- plans -----------------------------------------------------------------------------------

Service::Group* Service::pick_group(const Request& request, TimePoint now) {
  Group* best = nullptr;
  for (auto& group : groups_) {
    if (!group->scheduler || (group->full_until && now < *group->full_until)) continue;
    if (tries_again(*group)) continue;
    if (best != nullptr && group->scheduler->num_sequences() >= best->scheduler->num_sequences()) {
      continue;
    }
    if (group->scheduler->has_room(request.segment_keys)) best = group.get();
  }
  return best;
}

// Whether a request that there was no room for is being tried again. It is tried alone: where those
// behind it came in beside it, a large one would wait until no small ones come any more.
bool Service::tries_again(const Group& group) const {
  return std::ranges::any_of(by_sequence_, [&](const auto& running) {
    const auto& request = *requests_.at(running.second);
    return request.was_refused && request.state() == RequestState::kRunning &&
           request.group() == group.ranks.group();
  });
}

// The next to be started: the first of the tenant with the fewest running, so that no tenant waits
// for all that another asked for before it. But nobody passes one that there was no room for (see
// tries_again).
Request* Service::next_waiting(TimePoint now) {
  const bool has_room = std::ranges::any_of(groups_, [](const auto& group) {
    return group->scheduler && group->scheduler->has_room({});
  });
  if (waiting_.empty() || !has_room) return nullptr;
  std::map<std::string, int> running;
  for (const auto& [sequence, id] : by_sequence_) ++running[requests_.at(id)->tenant()];
  Request* next = nullptr;
  for (const auto id : waiting_) {
    auto& request = *find(id);
    if (request.retry_at && now < *request.retry_at) {
      next_retry_ = std::min(next_retry_, *request.retry_at);
      continue;
    }
    if (next == nullptr || running[request.tenant()] < running[next->tenant()]) next = &request;
    if (request.was_refused) break;
  }
  return next;
}

void Service::start_waiting(TimePoint now) {
  next_retry_ = TimePoint::max();
  while (auto* request = next_waiting(now)) {
    const auto segments = static_cast<std::size_t>(request->length() / kSegmentTokens);
    for (const auto& group : groups_) {
      if (group->scheduler) extend_keys(*group, *request, segments);
    }
    auto* group = pick_group(*request, now);
    if (group == nullptr) return;
    waiting_.erase(request->origin().id);
    start(*request, *group, segments, now);
  }
}

void Service::start(Request& request, Group& group, std::size_t segments, TimePoint now) {
  const auto sequence = SequenceId{++last_sequence_};
  request.retry_at.reset();
  request.tried_at = now;
  request.run_as(group.ranks.group(), sequence);
  request.segments_given = segments;
  by_sequence_[sequence] = request.origin().id;
  group.scheduler->add({request.admission(sequence), request.tokens_left(), request.segment_keys});
}

void Service::pump(TimePoint now) {
  start_waiting(now);
  for (auto& group : groups_) {
    while (group->scheduler) {
      const auto plan = group->scheduler->next_plan();
      if (!plan || !send_plan(*group, *plan, now)) break;
      start_waiting(now);
    }
  }
}

bool Service::send_plan(Group& group, const StepPlan& plan, TimePoint now) {
  group.ranks.on_plan_sent(plan.step);
  const auto frame = encode(CoordinatorMessage(plan));
  for (const auto& peer : group.ranks.peers()) {
    const auto sent = outbox_.to_worker(peer, frame);
    if (sent) continue;
    on_event(group, group.ranks.on_unsent(peer, sent.error()), now);
    return false;
  }
  return true;
}

}  // namespace foretoken::coordinator
