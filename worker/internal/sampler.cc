#include "worker/sampler.h"

#include "common/check.h"

namespace foretoken::worker {
namespace {

bool has_penalty(const SamplingParams& sampling) {
  return sampling.repetition_penalty != 1.0F || sampling.presence_penalty != 0.0F ||
         sampling.frequency_penalty != 0.0F;
}

TokenInfo token_info(const kernels::SampledToken& sampled) {
  TokenInfo info{.id = sampled.token, .logprob = sampled.logprob, .top = {}};
  for (int i = 0; i < sampled.num_top; ++i) {
    info.top.push_back({sampled.top_ids[i], sampled.top_logprobs[i]});
  }
  return info;
}

}  // namespace

Sampler::Sampler(kernels::Device& device, int max_rows, int vocab, int max_model_len)
    : device_(device),
      vocab_(vocab),
      max_model_len_(max_model_len),
      rows_(device, sizeof(kernels::SampleRow) * static_cast<std::size_t>(max_rows),
            kernels::MemoryUse::kTables),
      tokens_(device,
              sizeof(TokenId) * static_cast<std::size_t>(max_rows) *
                  static_cast<std::size_t>(max_model_len),
              kernels::MemoryUse::kTables),
      sampled_(device, sizeof(kernels::SampledToken) * static_cast<std::size_t>(max_rows),
               kernels::MemoryUse::kTables) {}

kernels::SampleRow Sampler::make_row(const Sequence& sequence, int row, kernels::Stream& stream) {
  const SamplingParams& sampling = sequence.sampling;
  TokenId* tokens = tokens_.as<TokenId>() + static_cast<std::ptrdiff_t>(row) * max_model_len_;
  if (has_penalty(sampling)) {
    device_.copy_in(tokens, sequence.tokens.data(), sequence.tokens.size() * sizeof(TokenId),
                    stream);
  }
  return {.temperature = sampling.temperature,
          .top_k = sampling.top_k,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .repetition_penalty = sampling.repetition_penalty,
          .presence_penalty = sampling.presence_penalty,
          .frequency_penalty = sampling.frequency_penalty,
          .seed = sampling.seed,
          .position = sequence.length(),
          .tokens = tokens,
          .num_prompt = sequence.num_prompt(),
          .num_tokens = sequence.length(),
          .num_logprobs = sampling.num_logprobs,
          .forced = sequence.next_forced()};
}

std::vector<SequenceToken> Sampler::sample(const float* logits, std::span<Sequence* const> rows,
                                           kernels::Stream& stream) {
  std::vector<kernels::SampleRow> host_rows;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    host_rows.push_back(make_row(*rows[i], static_cast<int>(i), stream));
  }
  device_.copy_in(rows_.data(), host_rows.data(), host_rows.size() * sizeof host_rows[0], stream);
  device_.sample({.logits = logits,
                  .rows = rows_.as<kernels::SampleRow>(),
                  .num_rows = static_cast<int>(rows.size()),
                  .vocab = vocab_,
                  .out = sampled_.as<kernels::SampledToken>()},
                 stream);
  std::vector<kernels::SampledToken> sampled(rows.size());
  device_.copy_out(sampled.data(), sampled_.data(), sampled.size() * sizeof sampled[0], stream);
  stream.synchronize();
  std::vector<SequenceToken> tokens;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    tokens.push_back({rows[i]->id(), rows[i]->length(), token_info(sampled[i])});
    rows[i]->tokens.push_back(sampled[i].token);
  }
  return tokens;
}

}  // namespace foretoken::worker
