#include "worker/sampler.h"

#include "common/check.h"

namespace foretoken::worker {
namespace {

// Below it a draw is greedy, as in vLLM: logits divided by less could overflow.
constexpr float kLeastTemperature = 1e-5F;

kernels::SampleRow make_row(const Sequence& sequence) {
  const SamplingParams& sampling = sequence.sampling;
  return {.temperature = sampling.temperature < kLeastTemperature ? 0 : sampling.temperature,
          .top_k = sampling.top_k,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .repetition_penalty = sampling.repetition_penalty,
          .presence_penalty = sampling.presence_penalty,
          .frequency_penalty = sampling.frequency_penalty,
          .seed = sampling.seed,
          .position = sequence.length(),
          .tokens = sequence.kv().tokens,
          .num_prompt = sequence.num_prompt(),
          .num_tokens = sequence.length(),
          .append = sequence.length() < sequence.max_length(),
          .num_logprobs = sampling.num_logprobs,
          .forced = sequence.next_forced(),
          .mismatches = sequence.kv().mismatches};
}

LostSequence lost(SequenceId sequence, std::uint32_t mismatches) {
  return {sequence,
          {ErrorCode::kCorrupt, std::to_string(mismatches) + " KV blocks failed their check"},
          mismatches};
}

TokenInfo token_info(const kernels::SampledToken& sampled) {
  TokenInfo info{.id = sampled.token, .logprob = sampled.logprob, .top = {}};
  for (int i = 0; i < sampled.num_top; ++i) {
    info.top.push_back({sampled.top_ids[i], sampled.top_logprobs[i]});
  }
  return info;
}

}  // namespace

Sampler::Sampler(kernels::Device& device, int max_rows, int vocab)
    : device_(device),
      max_rows_(max_rows),
      vocab_(vocab),
      rows_(device, sizeof(kernels::SampleRow) * static_cast<std::size_t>(max_rows),
            kernels::MemoryUse::kTables) {
  if (device.runs_at_once()) return;
  const auto counts = static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(vocab);
  token_counts_ = {device, sizeof(std::uint32_t) * counts, kernels::MemoryUse::kActivations};
}

Sampler::Draw* Sampler::begin(std::span<Sequence* const> rows, kernels::Stream& stream) {
  FT_CHECK(static_cast<int>(rows.size()) <= max_rows_, rows.size(), max_rows_);
  if (idle_.empty()) {
    draws_.push_back(std::make_unique<Draw>(device_, static_cast<std::size_t>(max_rows_)));
    idle_.push_back(draws_.back().get());
  }
  Draw* draw = idle_.back();
  idle_.pop_back();
  draw->tokens.clear();
  const auto staged = draw->rows.first(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    staged[i] = make_row(*rows[i]);
    staged[i].out = draw->sampled.data() + i;
    draw->tokens.push_back({rows[i]->id(), rows[i]->length(), {}});
    rows[i]->grow();
  }
  device_.read_in(rows_.data(), staged.data(), staged.size_bytes(), stream);
  return draw;
}

void Sampler::run(const float* logits, int num_rows, kernels::Stream& stream) {
  device_.sample({.logits = logits,
                  .rows = rows_.as<kernels::SampleRow>(),
                  .num_rows = num_rows,
                  .vocab = vocab_,
                  .token_counts = token_counts_.as<std::uint32_t>()},
                 stream);
}

void Sampler::end(Draw& draw, kernels::Stream& stream) { draw.done->record(stream); }

void Sampler::collect(Draw* draw, StepResult& result) {
  draw->done->synchronize();
  for (std::size_t i = 0; i < draw->tokens.size(); ++i) {
    const kernels::SampledToken& sampled = draw->sampled.data()[i];
    SequenceToken& token = draw->tokens[i];
    token.token = token_info(sampled);
    result.tokens.push_back(token);
    if (sampled.mismatches > 0) result.lost.push_back(lost(token.sequence, sampled.mismatches));
  }
  idle_.push_back(draw);
}

}  // namespace foretoken::worker
