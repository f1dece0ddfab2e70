// Sampling, as kernels/device.h documents it. Order of the filters as in vLLM: penalties,
// temperature, min-p, top-k, top-p.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/philox.h"

namespace foretoken::kernels {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Indices of the n largest logits, best first; ties by index.
std::vector<int> best_of(const float* logits, int vocab, int n) {
  std::vector<int> order(static_cast<std::size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  const auto better = [logits](int a, int b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  n = std::min(n, vocab);
  std::partial_sort(order.begin(), order.begin() + n, order.end(), better);
  order.resize(static_cast<std::size_t>(n));
  return order;
}

int argmax(const float* logits, int vocab) {
  return static_cast<int>(std::max_element(logits, logits + vocab) - logits);
}

float log_sum_exp(const float* logits, int vocab) {
  const float top = logits[argmax(logits, vocab)];
  double sum = 0;
  for (int i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i] - top));
  return static_cast<float>(top + std::log(sum));
}

// repetition (CTRL, arXiv 1909.05858 §4.1): over prompt and output; presence and frequency
// (OpenAI's API): over the output.
void apply_penalties(std::vector<float>& logits, const SampleRow& row) {
  if (row.repetition_penalty == 1 && row.presence_penalty == 0 && row.frequency_penalty == 0) {
    return;
  }
  std::unordered_map<TokenId, int> output_counts;  // 0: in the prompt alone
  for (int i = 0; i < row.num_tokens; ++i) output_counts[row.tokens[i]] += i >= row.num_prompt;
  for (const auto& [token, count] : output_counts) {
    if (token < 0 || static_cast<std::size_t>(token) >= logits.size()) continue;
    float& logit = logits[static_cast<std::size_t>(token)];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (count > 0) {
      logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(count);
    }
  }
}

// What top-k, min-p and top-p leave, best first.
std::vector<int> candidates(const std::vector<float>& logits, const SampleRow& row) {
  const int vocab = static_cast<int>(logits.size());
  const bool filters = row.top_k > 0 || row.top_p < 1;
  std::vector<int> kept;
  if (filters) {
    kept = best_of(logits.data(), vocab, row.top_k > 0 ? row.top_k : vocab);
  } else {
    kept.resize(logits.size());
    std::iota(kept.begin(), kept.end(), 0);
  }
  const float top = *std::max_element(logits.begin(), logits.end());
  const auto at = [&logits](int token) { return logits[static_cast<std::size_t>(token)]; };
  if (row.min_p > 0) {
    std::erase_if(kept, [&](int token) { return at(token) < top + std::log(row.min_p); });
  }
  if (row.top_p < 1) {
    double total = 0;
    for (const int token : kept) total += std::exp(static_cast<double>(at(token) - top));
    double sum = 0;
    std::size_t size = 0;
    while (size < kept.size() && (size == 0 || sum < row.top_p * total)) {
      sum += std::exp(static_cast<double>(at(kept[size++]) - top));
    }
    kept.resize(size);
  }
  return kept;
}

TokenId draw(const float* raw, int vocab, const SampleRow& row) {
  std::vector<float> logits(raw, raw + vocab);
  apply_penalties(logits, row);
  if (row.temperature <= 0) return argmax(logits.data(), vocab);
  for (float& logit : logits) logit /= row.temperature;
  const std::vector<int> kept = candidates(logits, row);
  const float top = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights;
  double total = 0;
  for (const int token : kept) {
    total += std::exp(static_cast<double>(logits[static_cast<std::size_t>(token)] - top));
    weights.push_back(total);  // cumulative
  }
  const double target = philox_uniform(row.seed, static_cast<std::uint64_t>(row.position)) * total;
  const auto found = std::upper_bound(weights.begin(), weights.end(), target);
  const auto index = std::min(static_cast<std::size_t>(found - weights.begin()), kept.size() - 1);
  return kept[index];
}

SampledToken sample_row(const float* logits, int vocab, const SampleRow& row) {
  SampledToken out{};
  const bool finite = std::all_of(logits, logits + vocab, [](float x) { return std::isfinite(x); });
  if (!finite) {
    out.token = 0;
    out.logprob = kMinusInfinity;  // the caller sees that nothing was drawn
    return out;
  }
  out.token = row.forced >= 0 && row.forced < vocab ? row.forced : draw(logits, vocab, row);
  const float normalizer = log_sum_exp(logits, vocab);
  out.logprob = logits[out.token] - normalizer;
  out.num_top = std::min(row.num_logprobs, kMaxLogprobs);
  if (out.num_top <= 0) return out;
  const std::vector<int> best = best_of(logits, vocab, out.num_top);
  out.num_top = static_cast<std::int32_t>(best.size());
  for (std::size_t i = 0; i < best.size(); ++i) {
    out.top_ids[i] = best[i];
    out.top_logprobs[i] = logits[best[i]] - normalizer;
  }
  return out;
}

}  // namespace

void CpuDevice::sample(const SampleArgs& args, Stream& stream) {
  FT_CHECK(args.vocab > 0, args.vocab);
  enqueue(stream, [this, args] {
    pool_.parallel_for(args.num_rows, [&](int i, int) {
      const float* logits = args.logits + static_cast<std::ptrdiff_t>(i) * args.vocab;
      const SampleRow& row = args.rows[i];
      *row.out = sample_row(logits, args.vocab, row);
      row.out->mismatches = row.mismatches == nullptr ? 0 : *row.mismatches;
      if (row.append) row.tokens[row.num_tokens] = row.out->token;
    });
  });
}

}  // namespace foretoken::kernels
