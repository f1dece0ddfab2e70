#include "coordinator/scheduler.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/check.h"

namespace foretoken::coordinator {
namespace {

// Admitted sequences that wait for their prefill hold memory; these are enough to hide the time
// that an admission takes.
constexpr int kMaxBeforePrefill = 4;
// Of the bound on a step (guessed): what varies from one to the next, and the way to the client,
// are the rest.
constexpr double kAim = 0.95;

// What takes time of a step, and computes nothing. A start takes little.
bool has_changes(const StepPlan& plan) {
  return !plan.releases.empty() || !plan.publishes.empty() || !plan.spills.empty() ||
         !plan.admits.empty();
}

Error broken(const std::string& why) {
  return {ErrorCode::kInternal, "the ranks of a group disagree: " + why};
}
std::string name(SequenceId id) { return "sequence " + std::to_string(raw(id)); }

void add_to(KvReport& sum, const KvReport& part) {
  sum.recall_sum += part.recall_sum;
  sum.recall_count += part.recall_count;
  sum.kl_sum += part.kl_sum;
  sum.kl_count += part.kl_count;
  sum.blocks_predicted += part.blocks_predicted;
  sum.blocks_fetched += part.blocks_fetched;
  sum.bytes_host += part.bytes_host;
  sum.bytes_nvme += part.bytes_nvme;
  sum.late += part.late;
  sum.checksum_failures += part.checksum_failures;
  sum.predictor_fallbacks += part.predictor_fallbacks;
  sum.dense_fallbacks += part.dense_fallbacks;
  sum.dense_capped += part.dense_capped;
  sum.device_bytes += part.device_bytes;
  sum.full_kv_bytes += part.full_kv_bytes;
}

std::int64_t prompt_length(const NewSequence& sequence) {
  return static_cast<std::int64_t>(sequence.admit.prompt.size());
}

// A prefix comes soon, room can be made on a device, room may come, what is wrong stays wrong: the
// worst is what counts.
int weight(const AdmitResult& answer) {
  if (!answer.error) return 0;
  if (answer.error->code == ErrorCode::kPending) return 1;
  if (answer.device_is_full) return 2;
  return answer.error->code == ErrorCode::kExhausted ? 3 : 4;
}

// What all ranks can do of an admission or a start: the least of their answers.
Result<AdmitResult> joint_answer(SequenceId id, const std::vector<StepResult>& ranks) {
  AdmitResult joint;
  joint.sequence = id;
  joint.reusable_tokens = std::numeric_limits<std::int64_t>::max();
  for (const auto& rank : ranks) {
    const auto answer = std::find_if(rank.admits.begin(), rank.admits.end(),
                                     [id](const auto& a) { return a.sequence == id; });
    if (answer == rank.admits.end()) return broken("no answer to the admission of " + name(id));
    const auto reusable = std::min(joint.reusable_tokens, answer->reusable_tokens);
    if (weight(*answer) > weight(joint)) joint = *answer;
    joint.reusable_tokens = reusable;
  }
  return joint;
}

}  // namespace

// ---- sequences come and go -------------------------------------------------------------------

bool Scheduler::has_room(const std::vector<PrefixKey>& segment_keys) const {
  int present = 0;
  int before_prefill = 0;
  for (const auto& [id, sequence] : sequences_) {
    if (sequence.release_planned) continue;
    ++present;
    if (sequence.releasing) continue;
    const bool has_begun = sequence.layer > 0 || sequence.token > sequence.reused;
    before_prefill += sequence.phase <= Phase::kPrefilling && !has_begun;
    const auto& theirs = sequence.given.segment_keys;
    if (!sequence.prompt_done && !theirs.empty() && !segment_keys.empty() &&
        theirs.front() == segment_keys.front()) {
      return false;
    }
  }
  return present < config_.max_num_seqs && before_prefill < kMaxBeforePrefill;
}

void Scheduler::add(NewSequence sequence) {
  const auto id = sequence.admit.sequence;
  FT_CHECK(sequences_.empty() || sequences_.rbegin()->first < id, raw(id));
  FT_CHECK(!sequence.admit.prompt.empty() && sequence.max_new_tokens > 0, raw(id));
  // The last 64 queries are always computed: they are the history that prediction starts from.
  const auto reusable =
      std::max<std::int64_t>(0, prompt_length(sequence) - kLocalTokens) / kSegmentTokens;
  const auto& keys = sequence.segment_keys;
  const auto count = std::min(static_cast<std::size_t>(reusable), keys.size());
  sequence.admit.prefix_keys.assign(keys.begin(),
                                    keys.begin() + static_cast<std::ptrdiff_t>(count));
  sequence.admit.dense = config_.spills;
  sequences_[id].given = std::move(sequence);
}

void Scheduler::publish(const PublishSegment& segment) {
  const auto found = sequences_.find(segment.sequence);
  FT_CHECK(found != sequences_.end(), raw(segment.sequence));
  if (!found->second.releasing) found->second.publishes.push_back(segment);
}

bool Scheduler::is_dense(SequenceId id) const {
  const auto found = sequences_.find(id);
  FT_CHECK(found != sequences_.end(), raw(id));
  return found->second.given.admit.dense;
}

bool Scheduler::release(SequenceId id) {
  const auto found = sequences_.find(id);
  FT_CHECK(found != sequences_.end() && !found->second.releasing, raw(id));
  if (found->second.phase == Phase::kNew && !found->second.refused) {
    sequences_.erase(found);
    return false;
  }
  found->second.releasing = true;
  return true;
}

// ---- plans -----------------------------------------------------------------------------------

std::optional<StepPlan> Scheduler::next_plan() {
  if (in_flight_.size() >= kMaxInFlight) return std::nullopt;
  StepPlan plan;
  InFlight step;
  plan_publishes_and_releases(plan, step);
  plan_spills(plan, step);
  plan_admissions(plan, step);
  step.has_changes = has_changes(plan);
  plan_decodes(plan, step);
  plan_prefills(plan, step);
  if (!step.has_changes && plan.starts.empty() && plan.prefills.empty() && plan.decodes.empty()) {
    return std::nullopt;
  }
  plan.epoch = config_.epoch;
  plan.step = step.step = StepNumber{++last_step_};
  in_flight_.push_back(std::move(step));
  return plan;
}

// A plan's releases come before its publishes, so a sequence with both is released a plan later.
void Scheduler::plan_publishes_and_releases(StepPlan& plan, InFlight& step) {
  for (auto& [id, sequence] : sequences_) {
    if (!sequence.publishes.empty()) {
      plan.publishes.insert(plan.publishes.end(), sequence.publishes.begin(),
                            sequence.publishes.end());
      sequence.publishes.clear();
    } else if (sequence.releasing && !sequence.release_planned) {
      sequence.release_planned = true;
      plan.releases.push_back(id);
    }
  }
  step.releases = plan.releases;
}

void Scheduler::plan_spills(StepPlan& plan, InFlight& step) {
  for (auto& [id, sequence] : sequences_) {
    if (std::exchange(sequence.spill_due, false) && !sequence.releasing) plan.spills.push_back(id);
  }
  step.spills = !plan.spills.empty();
}

void Scheduler::plan_admissions(StepPlan& plan, InFlight& step) {
  for (auto& [id, sequence] : sequences_) {
    if (sequence.releasing) continue;
    if (sequence.phase == Phase::kNew) {
      if (std::exchange(sequence.refused, false)) plan.releases.push_back(id);
      plan.admits.push_back(sequence.given.admit);
      step.admits.push_back(id);
      sequence.phase = Phase::kAdmitting;
    } else if (sequence.phase == Phase::kAdmitted) {
      plan.starts.push_back({id, sequence.reused});
      step.starts.push_back(id);
      // Without a prefix there is nothing that a rank could fail to swap.
      const bool may_fail = !sequence.given.admit.prefix_keys.empty();
      sequence.phase = may_fail ? Phase::kStarting : Phase::kPrefilling;
      sequence.token = sequence.reused;
    }
  }
}

void Scheduler::plan_decodes(StepPlan& plan, InFlight& step) {
  for (auto& [id, sequence] : sequences_) {
    if (sequence.phase != Phase::kDecoding || sequence.releasing ||
        sequence.planned >= sequence.given.max_new_tokens) {
      continue;
    }
    ++sequence.planned;
    plan.decodes.push_back(id);
    step.sampling.push_back(id);
  }
  step.num_decodes = static_cast<int>(plan.decodes.size());
}

Scheduler::Budget Scheduler::whole_budget(const InFlight& step) const {
  Budget budget{std::int64_t{config_.max_batched_tokens} * config_.num_layers};
  if (config_.max_inter_token && step.num_decodes > 0) {
    budget.units = times_.units_beside_decodes(kAim * *config_.max_inter_token, step.has_changes);
  }
  return budget;
}

std::int64_t Scheduler::tokens_within(const Budget& budget, std::int64_t begin) const {
  if (!budget.units) return budget.token_layers;
  return std::min(budget.token_layers, times_.tokens_within(*budget.units, begin));
}

void Scheduler::spend(const PrefillItem& item, Budget& left, InFlight& step) const {
  const int layers = item.layer_end - item.layer_begin;
  const double units = layers * times_.units(item.token_begin, item.token_end);
  left.token_layers -= layers * (item.token_end - item.token_begin);
  if (left.units) left.units = std::max(0.0, *left.units - units);
  step.prefill_units += units;
}

// A rank holds what lies between the layers of one prompt: one whose first item is out comes first,
// also where a sequence that was added before it is ready only now.
void Scheduler::plan_prefills(StepPlan& plan, InFlight& step) {
  auto whole = whole_budget(step);
  auto left = whole;
  for (auto& [id, sequence] : sequences_) {
    const bool has_begun = sequence.layer > 0 || sequence.token > sequence.reused;
    if (has_begun && !plan_prefill(sequence, whole, left, plan, step)) return;
  }
  for (auto& [id, sequence] : sequences_) {
    if (sequence.phase == Phase::kStarting && !sequence.releasing) return;  // it comes first
    if (!plan_prefill(sequence, whole, left, plan, step)) return;
  }
}

// False when the rest of its prompt waits for the next step.
bool Scheduler::plan_prefill(Sequence& sequence, Budget& whole, Budget& left, StepPlan& plan,
                             InFlight& step) {
  if (sequence.phase != Phase::kPrefilling || sequence.releasing) return true;
  if (whole.units && plan.prefills.empty()) {
    const auto least = times_.units(sequence.token, sequence.token + kBlockTokens);
    left.units = whole.units = std::max(*whole.units, least);
  }
  while (sequence.layer < config_.num_layers) {
    const auto item = cut_prefill(sequence, whole, left);
    if (!item) return false;
    spend(*item, left, step);
    plan.prefills.push_back(*item);
  }
  sequence.phase = Phase::kDecoding;
  sequence.planned = 1;
  const auto id = sequence.given.admit.sequence;
  step.prefilled.push_back(id);
  step.sampling.push_back(id);
  return true;
}

// The next item of a prompt; nullopt when it had better wait for the next step: a layer is cut only
// where a whole step can't hold it, and then by whole segments or blocks.
std::optional<PrefillItem> Scheduler::cut_prefill(Sequence& sequence, const Budget& whole,
                                                  const Budget& left) const {
  const auto length = prompt_length(sequence.given);
  PrefillItem item{sequence.given.admit.sequence, sequence.layer, sequence.layer + 1,
                   sequence.token, length};
  const auto rest = length - sequence.token;
  const auto fits = tokens_within(left, sequence.token);
  if (rest > fits) {
    const auto most = tokens_within(whole, sequence.token);
    const std::int64_t unit = most >= kSegmentTokens ? kSegmentTokens
                              : most >= kBlockTokens ? kBlockTokens
                                                     : 1;
    if (rest <= most || fits < unit) return std::nullopt;
    item.token_end = sequence.token + fits / unit * unit;
    sequence.token = item.token_end;
    return item;
  }
  if (sequence.token == sequence.reused) {
    auto layers = left.token_layers / rest;
    if (left.units) {
      const double one = times_.units(sequence.token, length);
      layers = std::clamp<std::int64_t>(static_cast<std::int64_t>(*left.units / one), 1, layers);
    }
    item.layer_end =
        static_cast<int>(std::min<std::int64_t>(config_.num_layers, sequence.layer + layers));
  }
  sequence.layer = item.layer_end;
  sequence.token = sequence.reused;
  return item;
}

// ---- results ---------------------------------------------------------------------------------

Result<std::vector<StepEvent>> Scheduler::on_results(const std::vector<StepResult>& ranks) {
  FT_CHECK(!ranks.empty());
  if (in_flight_.empty() || ranks.front().step != in_flight_.front().step) {
    return broken("a result of step " + std::to_string(raw(ranks.front().step)) +
                  " that is not the next one");
  }
  const InFlight step = std::move(in_flight_.front());
  in_flight_.pop_front();
  for (const auto& rank : ranks) {
    if (rank.token_digest != ranks.front().token_digest) {
      return broken("rank " + std::to_string(rank.rank) + " drew other tokens in step " +
                    std::to_string(raw(step.step)));
    }
  }
  std::vector<StepEvent> events;
  learn(step, ranks, events);
  FT_RETURN_IF_ERROR(on_admits(step, ranks, events));
  on_lost(ranks, events);
  FT_RETURN_IF_ERROR(on_tokens(step, ranks.front(), events));
  on_prefilled(step);
  on_releases(step, ranks, events);
  return events;
}

void Scheduler::learn(const InFlight& step, const std::vector<StepResult>& ranks,
                      std::vector<StepEvent>& events) {
  const auto slowest = std::ranges::max_element(ranks, {}, &StepResult::step_us);
  const std::chrono::microseconds time(slowest->step_us);
  if (step.num_decodes > 0 && config_.max_inter_token && time > *config_.max_inter_token) {
    events.emplace_back(LateStep{.step = step.step,
                                 .time = time,
                                 .rank = slowest->rank,
                                 .launching = std::chrono::microseconds(slowest->launch_us),
                                 .num_decodes = step.num_decodes,
                                 .prefill_units = step.prefill_units,
                                 .num_admitted = step.admits.size(),
                                 .num_started = step.starts.size(),
                                 .num_released = step.releases.size()});
  }
  times_.learn({.prefill_units = step.prefill_units,
                .num_decodes = step.num_decodes,
                .has_changes = step.has_changes,
                .time = time});
}

// True when a rank said no: the others let go of it too. It is tried again where a dense sequence
// can make room, else an event says so.
bool Scheduler::is_refused(const AdmitResult& answer, std::vector<StepEvent>& events) {
  if (!answer.error) return false;
  auto& sequence = sequences_.at(answer.sequence);
  if (answer.device_is_full && make_room(sequence)) return true;
  sequence.releasing = true;
  sequence.wanted = false;
  events.emplace_back(NotAdmitted{answer.sequence, *answer.error, answer.device_is_full});
  return true;
}

// The longest dense sequence that all ranks have admitted, or the refused one, spills. One at a
// time: while one is about to, nobody knows what it makes room for.
bool Scheduler::make_room(Sequence& refused) {
  const bool spilling =
      std::ranges::any_of(in_flight_, &InFlight::spills) ||
      std::ranges::any_of(sequences_, [](const auto& s) { return s.second.spill_due; });
  Sequence* longest = refused.given.admit.dense ? &refused : nullptr;
  for (auto& [id, sequence] : sequences_) {
    if (!sequence.given.admit.dense || sequence.releasing) continue;
    if (sequence.phase < Phase::kAdmitted) continue;
    const bool longer =
        longest == nullptr || sequence.given.admit.max_length > longest->given.admit.max_length;
    if (longer) longest = &sequence;
  }
  if (longest == nullptr && !spilling) return false;
  if (!spilling) {
    longest->given.admit.dense = false;
    longest->spill_due = longest != &refused;
  }
  refused.phase = Phase::kNew;
  refused.refused = true;
  return true;
}

Status Scheduler::on_admits(const InFlight& step, const std::vector<StepResult>& ranks,
                            std::vector<StepEvent>& events) {
  for (const auto id : step.admits) {
    FT_ASSIGN_OR_RETURN(const auto answer, joint_answer(id, ranks));
    auto& sequence = sequences_.at(id);
    if (sequence.releasing || is_refused(answer, events)) continue;
    const auto wanted = std::ssize(sequence.given.admit.prefix_keys);
    const auto segments =
        std::clamp<std::int64_t>(answer.reusable_tokens / kSegmentTokens, 0, wanted);
    sequence.reused = segments * kSegmentTokens;
    sequence.phase = Phase::kAdmitted;
    events.emplace_back(Admitted{id, sequence.reused});
  }
  for (const auto id : step.starts) {
    FT_ASSIGN_OR_RETURN(const auto answer, joint_answer(id, ranks));
    auto& sequence = sequences_.at(id);
    if (sequence.releasing || is_refused(answer, events)) continue;
    if (sequence.phase == Phase::kStarting) sequence.phase = Phase::kPrefilling;
  }
  return Ok{};
}

void Scheduler::on_lost(const std::vector<StepResult>& ranks, std::vector<StepEvent>& events) {
  std::map<SequenceId, Lost> lost;
  for (const auto& rank : ranks) {
    for (const auto& [id, error, failures] : rank.lost) {
      lost.try_emplace(id, Lost{id, error}).first->second.checksum_failures += failures;
    }
  }
  for (const auto& [id, event] : lost) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) continue;
    auto& sequence = found->second;
    sequence.lost = true;
    sequence.publishes.clear();
    if (std::exchange(sequence.releasing, true)) continue;
    sequence.wanted = false;
    events.emplace_back(event);
  }
}

Status Scheduler::on_tokens(const InFlight& step, const StepResult& rank0,
                            std::vector<StepEvent>& events) {
  if (rank0.tokens.size() != step.sampling.size()) {
    return broken("step " + std::to_string(raw(step.step)) + " drew " +
                  std::to_string(rank0.tokens.size()) + " tokens, planned were " +
                  std::to_string(step.sampling.size()));
  }
  for (const auto id : step.sampling) {
    const auto token = std::find_if(rank0.tokens.begin(), rank0.tokens.end(),
                                    [id](const auto& t) { return t.sequence == id; });
    if (token == rank0.tokens.end()) return broken("no token of " + name(id));
    const auto& sequence = sequences_.at(id);
    if (!sequence.releasing) events.emplace_back(Sampled{id, token->position, token->token});
  }
  return Ok{};
}

void Scheduler::on_prefilled(const InFlight& step) {
  for (const auto id : step.prefilled) {
    auto& sequence = sequences_.at(id);
    sequence.prompt_done = true;
    if (sequence.release_planned || sequence.lost) continue;
    const auto& keys = sequence.given.segment_keys;
    for (auto i = static_cast<std::size_t>(sequence.reused / kSegmentTokens); i < keys.size();
         ++i) {
      sequence.publishes.push_back({id, static_cast<int>(i), keys[i]});
    }
  }
}

void Scheduler::on_releases(const InFlight& step, const std::vector<StepResult>& ranks,
                            std::vector<StepEvent>& events) {
  for (const auto id : step.releases) {
    const auto found = sequences_.find(id);
    Released released{id, {}};
    released.kv.spilled = config_.spills && !found->second.given.admit.dense;
    for (const auto& rank : ranks) {
      for (const auto& stats : rank.stats) {
        if (stats.sequence == id) add_to(released.kv, stats.kv);
      }
    }
    if (found->second.wanted) events.push_back(std::move(released));
    sequences_.erase(found);
  }
}

}  // namespace foretoken::coordinator
