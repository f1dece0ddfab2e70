#include "tests/coordinator/fake_worker.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace foretoken::coordinator {
namespace {

void require(bool condition, const std::string& rule) {
  if (!condition) throw std::logic_error("a plan breaks the rules: " + rule);
}

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash ^= value + 0x9E3779B97F4A7C15ULL + (hash << 6) + (hash >> 2);
  hash *= 0xFF51AFD7ED558CCDULL;
  return hash ^ (hash >> 33);
}

}  // namespace

TokenId next_token(std::span<const TokenId> tokens, std::uint64_t seed,
                   const FakeRankConfig& config) {
  auto hash = mix(seed, tokens.size());
  for (const auto id : tokens) hash = mix(hash, static_cast<std::uint64_t>(id));
  if (config.eos_every > 0 && hash % static_cast<std::uint64_t>(config.eos_every) == 0) {
    return config.eos;
  }
  return static_cast<TokenId>('a' + (hash >> 32) % 26);
}

std::vector<TokenId> reference_tokens(std::vector<TokenId> prompt, std::uint64_t seed,
                                      int max_tokens, const FakeRankConfig& config) {
  std::vector<TokenId> output;
  while (static_cast<int>(output.size()) < max_tokens) {
    output.push_back(next_token(prompt, seed, config));
    prompt.push_back(output.back());
    if (output.back() == config.eos) break;
  }
  return output;
}

FakeRank::FakeRank(const FakeRankConfig& config, std::shared_ptr<FakeStore> store)
    : config_(config), store_(std::move(store)) {}

// Its node's store frees what a dead rank held.
FakeRank::~FakeRank() {
  for (const auto& [id, sequence] : sequences_) free(sequence);
}

void FakeRank::free(const Sequence& sequence) {
  if (config_.rank == 0) store_->used -= sequence.slabs;
}

std::int64_t FakeRank::device_tokens(std::int64_t max_length, bool dense) const {
  return dense ? max_length : std::min(max_length, config_.budget_tokens);
}

KvSlabs FakeRank::count_slabs() const {
  return {.total = store_->slabs,
          .free = store_->slabs - store_->used,
          .cached = 0,
          .ready = store_->ready};
}

Ready FakeRank::ready(Epoch epoch) const {
  Ready ready;
  ready.epoch = epoch;
  ready.group = config_.group;
  ready.rank = config_.rank;
  ready.model_hash = "fake";
  ready.device = "fake";
  ready.max_model_len = config_.max_model_len;
  ready.max_batched_tokens = config_.max_batched_tokens;
  ready.device_bytes_free = kFakeDeviceBytes;
  ready.kv_slabs = count_slabs();
  return ready;
}

StepResult FakeRank::run(const StepPlan& plan) {
  require(raw(plan.step) == last_step_ + 1, "steps are numbered one by one");
  last_step_ = raw(plan.step);
  StepResult result;
  result.epoch = plan.epoch;
  result.step = plan.step;
  result.group = config_.group;
  result.rank = config_.rank;
  for (const auto id : plan.releases) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) continue;  // not admitted here
    KvReport report;
    report.blocks_fetched = static_cast<std::int64_t>(found->second.tokens.size());
    report.predictor_fallbacks = 2;
    result.stats.push_back({id, report});
    free(found->second);
    sequences_.erase(found);
  }
  for (const auto& publish : plan.publishes) {
    const auto& sequence = find(publish.sequence);
    require(sequence.prefilled, "a published segment was computed");
    require(static_cast<std::size_t>((publish.index + 1) * kSegmentTokens) < sequence.tokens.size(),
            "a published segment is whole, and its last token was fed back");
    require(static_cast<std::size_t>((publish.index + 1) * kSegmentTokens) <= sequence.dense_tokens,
            "a published segment was computed densely");
    if (config_.rank == config_.world_size - 1) store_->published.insert(publish.key);
  }
  for (const auto id : plan.spills) {
    require(find(id).dense, "a sequence spills once");
    find(id).dense = false;
    find(id).dense_tokens = find(id).tokens.size();
  }
  for (const auto& sequence : plan.admits) result.admits.push_back(admit(sequence));
  for (const auto& sequence : plan.starts) result.admits.push_back(start(sequence));
  std::int64_t cost = 0;
  for (const auto& item : plan.prefills) {
    cost += (item.layer_end - item.layer_begin) * (item.token_end - item.token_begin);
    prefill(item, result);
  }
  require(cost <= std::int64_t{config_.max_batched_tokens} * config_.num_layers,
          "prefill keeps to its budget");
  require(plan.decodes.size() <= static_cast<std::size_t>(config_.max_num_seqs),
          "at most max_num_seqs decode");
  require(sequences_.size() <= static_cast<std::size_t>(config_.max_num_seqs),
          "at most max_num_seqs are present");
  require(std::set(plan.decodes.begin(), plan.decodes.end()).size() == plan.decodes.size(),
          "a sequence decodes once a step");
  for (const auto id : plan.decodes) sample(id, result);
  if (store_->losses > 0 && !plan.decodes.empty() && config_.rank == config_.world_size - 1) {
    --store_->losses;
    result.lost.push_back({plan.decodes.front(), Error{store_->loss, "KV: injected"}, 3});
  }
  for (const auto& token : result.tokens) {
    result.token_digest = mix(result.token_digest, raw(token.sequence));
    result.token_digest = mix(result.token_digest, static_cast<std::uint64_t>(token.token.id));
  }
  result.step_us = config_.token_layer_us * cost;
  if (!plan.decodes.empty()) result.step_us += config_.decode_us;
  if (config_.rank != 0) result.tokens.clear();
  result.device_bytes_free = kFakeDeviceBytes - std::ssize(sequences_);
  result.kv_slabs = count_slabs();
  return result;
}

FakeRank::Sequence& FakeRank::find(SequenceId id) {
  const auto found = sequences_.find(id);
  require(found != sequences_.end(), "sequence " + std::to_string(raw(id)) + " was admitted");
  return found->second;
}

AdmitResult FakeRank::admit(const AdmitSequence& admit) {
  require(!sequences_.contains(admit.sequence), "a sequence is admitted once");
  require(!admit.prompt.empty(), "a prompt has tokens");
  const auto length = static_cast<std::int64_t>(admit.prompt.size());
  require(admit.max_length > length && admit.max_length <= config_.max_model_len,
          "a sequence fits the context");
  require(static_cast<std::int64_t>(admit.prefix_keys.size()) ==
              std::max<std::int64_t>(0, length - kLocalTokens) / kSegmentTokens,
          "exactly the reusable segments have keys");
  AdmitResult result;
  result.sequence = admit.sequence;
  if (!admit.prefix_keys.empty() && store_->pending_admits > 0) {
    --store_->pending_admits;
    result.error = Error{ErrorCode::kPending, "its prefix is on its way from NVMe"};
    return result;
  }
  std::int64_t on_device = device_tokens(admit.max_length, admit.dense);
  for (const auto& [id, other] : sequences_) {
    on_device += device_tokens(other.max_length, other.dense);
  }
  if (config_.device_tokens && on_device > *config_.device_tokens) {
    result.error = Error{ErrorCode::kExhausted, "the device is full"};
    result.device_is_full = true;
    return result;
  }
  Sequence sequence;
  sequence.dense = admit.dense;
  if (config_.device_tokens && !admit.dense) sequence.dense_tokens = admit.prompt.size();
  sequence.slabs = segments_for(admit.max_length);
  if (config_.rank == 0) {
    if (store_->used + sequence.slabs > std::min(store_->slabs, store_->ready)) {
      result.error = Error{ErrorCode::kExhausted, "no slabs; raise --kv-host-gib"};
      return result;
    }
    store_->used += sequence.slabs;
  }
  for (const auto& key : admit.prefix_keys) {
    if (!store_->published.contains(key)) break;
    sequence.reusable += kSegmentTokens;
  }
  result.reusable_tokens = sequence.reusable;
  sequence.tokens = admit.prompt;
  sequence.prompt = admit.prompt.size();
  sequence.max_length = admit.max_length;
  sequence.seed = admit.sampling.seed;
  sequence.forced = admit.forced_ids;
  sequences_[admit.sequence] = std::move(sequence);
  return result;
}

AdmitResult FakeRank::start(const StartSequence& start) {
  AdmitResult result;
  result.sequence = start.sequence;
  result.reusable_tokens = start.reused_tokens;
  auto& sequence = find(start.sequence);
  require(!sequence.started && start.reused_tokens <= sequence.reusable &&
              start.reused_tokens % kSegmentTokens == 0,
          "a start follows what all ranks have");
  if (sequence.reusable > 0 && store_->refuse_starts > 0) {
    --store_->refuse_starts;
    result.error = Error{ErrorCode::kExhausted, "no empty slabs to swap shared ones for"};
    return result;
  }
  sequence.started = true;
  sequence.reused = sequence.token = start.reused_tokens;
  return result;
}

void FakeRank::prefill(const PrefillItem& item, StepResult& result) {
  auto& sequence = find(item.sequence);
  const auto length = static_cast<std::int64_t>(sequence.prompt);
  require(sequence.started && !sequence.prefilled, "prefill follows the start");
  if (item.layer_begin == 0 && item.token_begin == sequence.reused) in_prefill_ = item.sequence;
  require(in_prefill_ == item.sequence, "a prefill ends before the next one begins");
  require(item.layer_begin == sequence.layer && item.token_begin == sequence.token,
          "prefill goes on where it stood");
  require(item.layer_end > item.layer_begin && item.layer_end <= config_.num_layers &&
              item.token_end > item.token_begin && item.token_end <= length,
          "a prefill item is within the model and the prompt");
  require(item.layer_end == item.layer_begin + 1 ||
              (item.token_begin == sequence.reused && item.token_end == length),
          "only whole layers come together");
  sequence.token = item.token_end == length ? sequence.reused : item.token_end;
  sequence.layer = item.token_end == length ? item.layer_end : item.layer_begin;
  if (sequence.layer < config_.num_layers) return;
  sequence.prefilled = true;
  sample(item.sequence, result);
}

void FakeRank::sample(SequenceId id, StepResult& result) {
  auto& sequence = find(id);
  require(sequence.prefilled, "decoding follows the prefill");
  const auto position = static_cast<std::int64_t>(sequence.tokens.size());
  require(position < sequence.max_length, "a sequence keeps to its greatest length");
  const auto index = sequence.tokens.size() - sequence.prompt;
  TokenInfo token;
  token.id = index < sequence.forced.size() ? sequence.forced[index]
                                            : next_token(sequence.tokens, sequence.seed, config_);
  token.logprob = -0.5F;
  sequence.tokens.push_back(token.id);
  result.tokens.push_back({id, position, token});
}

}  // namespace foretoken::coordinator
