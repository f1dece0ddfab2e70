#include "worker/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include "common/check.h"
#include "common/log.h"
#include "worker/internal/make_device.h"

namespace foretoken::worker {
namespace {

// At the end of an outsized sequence, for its prefix to get to NVMe: with others beside it, which
// wait meanwhile, and alone (guessed).
constexpr std::chrono::milliseconds kBusyPatience{100};
constexpr std::chrono::milliseconds kIdlePatience{2'000};

DecodeConfig decode_config(const ServiceConfig& config, int max_model_len,
                           const predictor::Policy& policy) {
  const bool calibrates = policy.calibration() != predictor::Calibration::kNone;
  return {.max_rows = config.max_num_seqs,
          .max_model_len = max_model_len,
          .calibrate_every = calibrates ? config.calibrate_every : 0,
          .audit_every = config.audit_every,
          .min_recall = static_cast<float>(config.min_recall),
          .max_dense_heads = config.max_dense_heads,
          .record = !config.guard_arena,
          .on_late = config.on_late == "skip" ? OnLate::kSkip : OnLate::kWait};
}

// FNV-1a over what was drawn: ranks that disagree are found at once.
std::uint64_t digest(const std::vector<SequenceToken>& tokens) {
  std::uint64_t hash = 0xCBF29CE484222325ULL;
  const auto mix = [&hash](std::uint64_t value) { hash = (hash ^ value) * 0x100000001B3ULL; };
  for (const SequenceToken& token : tokens) {
    mix(raw(token.sequence));
    mix(static_cast<std::uint64_t>(token.position));
    mix(static_cast<std::uint64_t>(token.token.id));
  }
  return hash;
}

// Blocks that ops have missed since a disk lost a sequence's KV say nothing of the memory.
void keep_errors_of_disks(std::vector<LostSequence>& lost) {
  std::set<SequenceId> on_disk;
  for (const LostSequence& one : lost) {
    if (one.error.code != ErrorCode::kCorrupt) on_disk.insert(one.sequence);
  }
  std::erase_if(lost, [&](const LostSequence& one) {
    return one.error.code == ErrorCode::kCorrupt && on_disk.contains(one.sequence);
  });
}

// Logits that are not numbers can't be sampled; the request's answer would be noise. All ranks see
// the same ones. Of KV that is lost they say nothing.
void note_overflows(StepResult& result) {
  std::set<SequenceId> lost;
  for (const LostSequence& one : result.lost) lost.insert(one.sequence);
  for (const SequenceToken& token : result.tokens) {
    if (std::isfinite(token.token.logprob) || lost.contains(token.sequence)) continue;
    result.lost.push_back(
        {token.sequence,
         {ErrorCode::kDevice, "logits at position " + std::to_string(token.position) +
                                  " are not finite; the weights overflow this device's number "
                                  "range"}});
  }
}

std::string memory_row(std::string_view what, std::size_t bytes) {
  return fmt::format("\n  {:<32}{:>10.1f}", what, static_cast<double>(bytes) / (1 << 20));
}

KvNvme nvme_of(const kvstore::NvmeStat& stat) {
  return {.state = std::string(kvstore::nvme_state_name(stat.state)),
          .slabs_total = stat.slabs_total,
          .slabs_held = stat.slabs_held,
          .slabs_read = stat.slabs_read,
          .slabs_written = stat.slabs_written,
          .bytes_read = stat.bytes_read,
          .bytes_written = stat.bytes_written,
          .evictions = stat.evictions,
          .dropped = stat.dropped,
          .io_errors = stat.io_errors,
          .checksum_failures = stat.checksum_failures,
          .host_checksum_failures = stat.host_checksum_failures,
          .tokens_passed_over = stat.tokens_passed_over};
}

// What admits a sequence that the device is too full for.
std::string how_to_admit(const ServiceConfig& config, const kernels::Device& device) {
  const bool could_stream =
      config.kv_policy == "full" && residency_of(config, device) == predictor::Residency::kAlways;
  return how_to_make_room(config) + (could_stream ? ", or serve with --kv-resident never" : "");
}

}  // namespace

predictor::Residency residency_of(const ServiceConfig& config, const kernels::Device& device) {
  using predictor::Residency;
  if (config.kv_resident == "never") return Residency::kNever;
  const bool records = !device.runs_at_once();
  return records && config.tensor_parallel_size > 1 ? Residency::kAlways : Residency::kWhereItFits;
}

Engine::Engine(const ServiceConfig& config, int max_model_len, const Parts& parts)
    : max_model_len_(max_model_len),
      max_batched_tokens_(config.max_batched_tokens),
      how_to_admit_(how_to_admit(config, parts.device)),
      rank_(parts.model.partition().rank),
      device_(parts.device),
      store_(parts.store),
      policy_(parts.policy),
      model_(parts.model),
      compute_(device_.make_stream(kernels::StreamKind::kCompute)),
      prefill_(model_, device_, store_, policy_, std::min(config.max_batched_tokens, max_model_len),
               max_model_len),
      sampler_(device_, config.max_num_seqs, static_cast<int>(model_.config().vocab_size)),
      decode_(decode_config(config, max_model_len, policy_), model_, device_, store_, policy_,
              sampler_),
      first_logits_(device_, sizeof(float) * static_cast<std::size_t>(model_.config().vocab_size),
                    kernels::MemoryUse::kActivations) {
  FT_CHECK(max_batched_tokens_ > 0, max_batched_tokens_);
  for (auto& event : ended_) event = device_.make_event();
}

Engine::~Engine() {
  try {
    drain();
  } catch (const Exception& failure) {
    log().error("at the end: {}", failure.what());
  }
}

void Engine::warm_up() {
  prefill_.warm_up(*compute_);
  compute_->synchronize();
}

void Engine::drain() {
  compute_->synchronize();
  prefill_.drain();
  decode_.drain();
}

bool Engine::only_computes(const StepPlan& plan) {
  return plan.releases.empty() && plan.publishes.empty() && plan.spills.empty() &&
         plan.admits.empty() && plan.starts.empty() &&
         std::ranges::none_of(
             plan.prefills, [&](const PrefillItem& item) { return is_outsized(item.sequence); }) &&
         std::ranges::none_of(plan.decodes, [&](SequenceId id) {
           return is_outsized(id) || decode_.audits(find(id));
         });
}

void Engine::launch(const StepPlan& plan) {
  Pending& pending = pending_.emplace_back();
  pending.launched = std::chrono::steady_clock::now();
  pending.ended = ended_[raw(plan.step) % ended_.size()].get();
  StepResult& result = pending.result;
  result.epoch = plan.epoch;
  result.step = plan.step;
  result.rank = rank_;
  const auto is_here = [&](SequenceId id) { return sequences_.contains(id); };
  if (std::ranges::any_of(plan.releases, is_here) || !plan.publishes.empty() ||
      !plan.spills.empty()) {
    drain();
  }
  for (const SequenceId id : plan.releases) release(id, result);
  for (const PublishSegment& segment : plan.publishes) publish(segment);
  for (const SequenceId id : plan.spills) spill(id);
  for (const AdmitSequence& sequence : plan.admits) result.admits.push_back(admit(sequence));
  for (const StartSequence& sequence : plan.starts) result.admits.push_back(start(sequence));
  for (const PrefillItem& item : plan.prefills) prefill(item, pending);
  if (!plan.decodes.empty()) decode(plan.decodes, pending);
  note_lost(plan, result);
  for (const auto& [id, sequence] : sequences_) publish_written(*sequence);
  result.device_bytes_free = device_bytes_free();
  if (!plan.releases.empty() || !plan.publishes.empty() || !plan.admits.empty()) {
    result.kv_slabs = count_slabs();
  }
  pending.ended->record(*compute_);
  launching_ += std::chrono::steady_clock::now() - pending.launched;
}

bool Engine::has_ended() const { return has_launched() && pending_.front().ended->done(); }

// What outsized sequences read and write beside the step goes on meanwhile.
void Engine::wait_for(kernels::Event& ended) {
  std::vector<Sequence*> outsized;
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->outsized() != nullptr && sequence->decodes()) outsized.push_back(sequence.get());
  }
  if (outsized.empty()) return ended.synchronize();
  work_until(ended, outsized, device_);
}

StepResult Engine::collect() {
  FT_CHECK(has_launched());
  Pending pending = std::move(pending_.front());
  pending_.pop_front();
  StepResult& result = pending.result;
  wait_for(*pending.ended);
  for (Sampler::Draw* draw : pending.draws) sampler_.collect(draw, result);
  keep_errors_of_disks(result.lost);
  note_overflows(result);
  result.token_digest = digest(result.tokens);
  if (rank_ != 0) result.tokens.clear();
  // A plan that was launched behind another has had the device only since that one's end.
  const auto begin = std::max(pending.launched, collected_);
  collected_ = std::chrono::steady_clock::now();
  const auto in_us = [](auto time) {
    return std::chrono::duration_cast<std::chrono::microseconds>(time).count();
  };
  result.step_us = in_us(collected_ - begin);
  result.launch_us = in_us(std::exchange(launching_, {}));
  tell_times(pending);
  return std::move(result);
}

// Slabs that aren't ready yet count as free: they will be.
KvSlabs Engine::count_slabs() const {
  const kvstore::StoreStat stat = store_.stat().value_or_throw();
  return {.total = stat.slabs_total,
          .free = stat.slabs_total - stat.slabs_used - stat.slabs_cached,
          .cached = stat.slabs_cached,
          .ready = stat.slabs_ready,
          .nvme = nvme_of(stat.nvme)};
}

Sequence& Engine::find(SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    throw Exception(ErrorCode::kInternal,
                    "a plan names sequence " + std::to_string(raw(id)) + ", which is not here");
  }
  return *found->second;
}

void Engine::release(SequenceId id, StepResult& result) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;  // its admission failed here, and not on another rank
  if (kvstore::OutsizedKv* outsized = found->second->outsized()) {
    outsized->finish_publishing(sequences_.size() > 1 ? kBusyPatience : kIdlePatience);
    publish_written(*found->second);
  }
  const KvReport report = found->second->final_report(*compute_);
  result.stats.push_back({id, report});
  sequences_.erase(found);
  Status status = Ok{};
  if (report.checksum_failures > 0) status = store_.distrust(id);
  if (status) status = store_.release(id);
  if (!status) throw Exception(status.error());
}

// Sequences of the plan whose KV on NVMe is lost: what they draw from here on is noise. Of what is
// lost in the arena the sampler tells, when the host reads the tokens.
void Engine::note_lost(const StepPlan& plan, StepResult& result) {
  std::set<SequenceId> worked_on(plan.decodes.begin(), plan.decodes.end());
  for (const PrefillItem& item : plan.prefills) worked_on.insert(item.sequence);
  for (const SequenceId id : worked_on) {
    const kvstore::OutsizedKv* outsized = find(id).outsized();
    if (outsized != nullptr && !outsized->status()) {
      result.lost.push_back({id, outsized->status().error()});
    }
  }
}

// A segment of an outsized sequence is published when it is on NVMe.
void Engine::publish(const PublishSegment& segment) {
  if (!model_.partition().writes_kv) return;
  if (kvstore::OutsizedKv* outsized = find(segment.sequence).outsized()) {
    return outsized->publish(segment.index, segment.key);
  }
  const Status status = store_.commit(segment.sequence, segment.index, segment.key);
  if (!status) throw Exception(status.error());
}

void Engine::publish_written(Sequence& sequence) {
  if (sequence.outsized() == nullptr) return;
  const Status status = store_.publish_written(sequence.reservation());
  if (!status) throw Exception(status.error());
}

void Engine::spill(SequenceId id) {
  Sequence& sequence = find(id);
  if (!sequence.is_dense()) {
    throw Exception(ErrorCode::kInternal,
                    "a plan spills sequence " + std::to_string(raw(id)) + ", which is not dense");
  }
  decode_.spill(sequence, *compute_);
}

AdmitResult Engine::admit(const AdmitSequence& admit) {
  AdmitResult result;
  result.sequence = admit.sequence;
  if (admit.max_length > max_model_len_) {
    result.error = Error{ErrorCode::kInvalidArgument,
                         "the sequence may grow to " + std::to_string(admit.max_length) +
                             " tokens; --max-model-len is " + std::to_string(max_model_len_)};
    return result;
  }
  Result<kvstore::Reservation> reservation =
      store_.reserve(admit.sequence, admit.prefix_keys, segments_for(admit.max_length));
  if (!reservation) {
    result.error = reservation.error();
    return result;
  }
  result.reusable_tokens = std::int64_t{reservation->hit_segments} * kSegmentTokens;
  try {
    sequences_[admit.sequence] = std::make_unique<Sequence>(
        admit, *std::move(reservation), model_.kv_shape(), policy_, device_, *compute_);
  } catch (const Exception& failure) {
    if (failure.error().code != ErrorCode::kExhausted) throw;
    sequences_.erase(admit.sequence);
    result.error = failure.error();
    if (sequences_.empty()) result.error->message += "; " + how_to_admit_;
    result.device_is_full = true;
    if (const Status status = store_.release(admit.sequence); !status) {
      throw Exception(status.error());
    }
  }
  return result;
}

AdmitResult Engine::start(const StartSequence& start) {
  AdmitResult result;
  result.sequence = start.sequence;
  result.reusable_tokens = start.reused_tokens;
  Sequence& sequence = find(start.sequence);
  const int segments = static_cast<int>(start.reused_tokens / kSegmentTokens);
  if (const Status status = store_.use(sequence.reservation(), segments); !status) {
    if (status.error().code != ErrorCode::kExhausted) throw Exception(status.error());
    result.error = status.error();
    return result;
  }
  sequence.upload_slabs(*compute_);
  sequence.reused_tokens = segments * kSegmentTokens;
  return result;
}

void Engine::prefill(const PrefillItem& item, Pending& pending) {
  Sequence& sequence = find(item.sequence);
  const auto begin = std::chrono::steady_clock::now();
  const bool is_done = prefill_.run(sequence, item, *compute_);
  time_prefill(sequence, item, std::chrono::steady_clock::now() - begin, pending);
  if (!is_done) return;
  decode_.begin(sequence, *compute_);
  model_.logits(1, prefill_.activations(), prefill_.last_token(sequence), first_logits_.as<float>(),
                *compute_);
  Sequence* row = &sequence;
  Sampler::Draw* draw = sampler_.begin(std::span(&row, 1), *compute_);
  sampler_.run(first_logits_.as<float>(), 1, *compute_);
  sampler_.end(*draw, *compute_);
  pending.draws.push_back(draw);
}

// What is left to compute behind a long prefix takes more time a token than a prompt does. Of an
// outsized sequence, run() waits for what it enqueues; other steps are timed when they have ended.
void Engine::time_prefill(const Sequence& sequence, const PrefillItem& item,
                          std::chrono::nanoseconds time, Pending& pending) {
  using std::chrono::microseconds;
  const auto [tokens_read, reading] = prefill_.take_reading();
  pending.prefilled.read += tokens_read;
  pending.prefilled.reading += std::chrono::duration_cast<microseconds>(reading);
  if (2 * sequence.reused_tokens > sequence.prompt_length()) return;
  pending.prefilled.computed +=
      (item.token_end - item.token_begin) * (item.layer_end - item.layer_begin);
  if (sequence.outsized() == nullptr) {
    pending.times_step = true;
  } else {
    pending.prefilled.computing += std::chrono::duration_cast<microseconds>(time - reading);
  }
}

void Engine::tell_times(Pending& pending) {
  kvstore::PrefillTimes& times = pending.prefilled;
  if (pending.times_step) {
    // All that ran in the step: decodes beside it too, which make computing look slower. What an
    // outsized sequence waited for is not in the time of a step that was launched behind another.
    times.computing = std::max(times.computing,
                               std::chrono::microseconds(pending.result.step_us) - times.reading);
  }
  if (times.computed + times.read == 0) return;
  if (const Status status = store_.note_prefill(times); !status) throw Exception(status.error());
}

void Engine::decode(const std::vector<SequenceId>& ids, Pending& pending) {
  std::vector<Sequence*> rows;
  rows.reserve(ids.size());
  for (const SequenceId id : ids) rows.push_back(&find(id));
  pending.draws.push_back(decode_.step(rows, *compute_));
}

std::int64_t Engine::device_bytes_free() const {
  std::size_t in_use = 0;
  for (int use = 0; use < static_cast<int>(kernels::MemoryUse::kCount); ++use) {
    in_use += device_.memory_in_use(static_cast<kernels::MemoryUse>(use));
  }
  return static_cast<std::int64_t>(device_.info().memory_bytes - in_use);
}

Ready Engine::capacity() const {
  Ready ready;
  ready.device = device_.info().name;
  ready.max_model_len = max_model_len_;
  ready.max_batched_tokens = max_batched_tokens_;
  ready.device_bytes_free = device_bytes_free();
  ready.kv_slabs = count_slabs();
  return ready;
}

std::string Engine::memory_plan() const {
  const kernels::DeviceInfo info = device_.info();
  const SequenceBytes longest = sequence_bytes(model_.kv_shape(), policy_, max_model_len_);
  const auto free = static_cast<std::size_t>(device_bytes_free());
  std::string plan = "device memory of " + info.name + ", MiB:";
  for (int i = 0; i < static_cast<int>(kernels::MemoryUse::kCount); ++i) {
    const auto use = static_cast<kernels::MemoryUse>(i);
    plan += memory_row(name_of(use), device_.memory_in_use(use));
  }
  plan += memory_row("free, for sequences", free) + memory_row("in all", info.memory_bytes);
  plan += memory_row(fmt::format("a sequence of {} tokens", max_model_len_), longest.total());
  plan += memory_row("  KV slots", longest.kv_slots) + memory_row("  tables", longest.tables);
  if (policy_.spills()) plan += memory_row("  KV slots until it spills", longest.all_blocks);
  plan += memory_row("  attention history", longest.history);
  plan += memory_row("  key sketches", longest.sketches);
  return plan + fmt::format("\n  such sequences that fit at once: {}", free / longest.total());
}

}  // namespace foretoken::worker
