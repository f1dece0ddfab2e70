// Decode, where a step is compared with dense attention over the same cache.
#include <algorithm>
#include <cmath>

#include "worker/decode.h"

namespace foretoken::worker {

void Decode::score_exactly(int layer, int row, kernels::Stream& compute) {
  kernels::DecodeAttentionArgs args =
      attention_args(layer, rows_[static_cast<std::size_t>(row)]->alone(), row);
  args.out = nullptr;  // keys alone
  args.lse = exact_lse_.as<float>();
  args.block_max = exact_max_.as<float>();
  args.pitch = exact_pitch_;
  store_.streamed_attention({args, nullptr}, compute);
}

// The step's token through the dense model, over the same cache. Its own K and V are overwritten by
// the step that follows; nothing else is.
void Decode::dense_pass(int row, kernels::Stream& compute) {
  const predictor::DecodeBatch& batch = rows_[static_cast<std::size_t>(row)]->alone();
  model_.embed_next(batch.sequences, 1, hidden_.data(), compute);
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    model_.project_qkv(layer, 1, act_, hidden_.data(), compute);
    // Slots in flight are read and written here.
    if (kind_.fetches_blocks) store_.wait(layer, compute);
    rope(layer, batch, compute);
    kernels::DecodeAttentionArgs args = attention_args(layer, batch, 0);
    args.block_max = nullptr;
    store_.streamed_attention({args, nullptr}, compute);
    model_.finish_layer(layer, 1, act_, hidden_.data(), compute);
  }
  model_.logits(1, act_, hidden_.data(),
                dense_logits_.as<float>() + row * model_.config().vocab_size, compute);
}

void Decode::measure_recall(int layer, int row, kernels::Stream& compute) {
  Sequence& sequence = *rows_[static_cast<std::size_t>(row)];
  score_exactly(layer, row, compute);
  const auto heads = static_cast<std::size_t>(model_.partition().heads.count);
  std::vector<float> kept(heads);
  std::vector<float> all(heads);
  device_.copy_out(kept.data(), attention_args(layer, batch_, row).lse, heads * sizeof(float),
                   compute);
  device_.copy_out(all.data(), exact_lse_.data(), heads * sizeof(float), compute);
  compute.synchronize();
  for (std::size_t head = 0; head < heads; ++head) {
    sequence.report.recall_sum += std::exp(static_cast<double>(kept[head]) - all[head]);
    ++sequence.report.recall_count;
  }
}

// KL(dense || sparse) of the next token's distribution.
void Decode::measure_kl(int row, kernels::Stream& compute) {
  const auto vocab = static_cast<std::size_t>(model_.config().vocab_size);
  std::vector<float> dense(vocab);
  std::vector<float> sparse(vocab);
  const std::size_t offset = static_cast<std::size_t>(row) * vocab;
  device_.copy_out(dense.data(), dense_logits_.as<float>() + offset, vocab * sizeof(float),
                   compute);
  device_.copy_out(sparse.data(), logits_.as<float>() + offset, vocab * sizeof(float), compute);
  compute.synchronize();
  const auto log_sum = [](const std::vector<float>& logits) {
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - top);
    return top + std::log(sum);
  };
  const double dense_sum = log_sum(dense);
  const double sparse_sum = log_sum(sparse);
  double kl = 0;
  for (std::size_t i = 0; i < vocab; ++i) {
    const double log_p = dense[i] - dense_sum;
    kl += std::exp(log_p) * (log_p - (sparse[i] - sparse_sum));
  }
  KvReport& report = rows_[static_cast<std::size_t>(row)]->report;
  report.kl_sum += kl;
  ++report.kl_count;
}

}  // namespace foretoken::worker
