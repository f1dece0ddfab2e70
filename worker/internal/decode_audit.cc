// Decode, where a step is compared with dense attention over the same cache, and what follows from
// that: heads that attend all blocks.
#include <algorithm>
#include <cmath>
#include <utility>

#include "worker/decode.h"

namespace foretoken::worker {

void Decode::score_exactly(int layer, int row, kernels::Stream& compute) {
  Sequence* sequence = rows_[static_cast<std::size_t>(row)];
  stream(all_blocks_args(layer, row), std::span(&sequence, 1), compute);
}

// The step's token through the dense model, over the same cache. Its own K and V are overwritten by
// the step that follows; nothing else is.
void Decode::dense_pass(int row, kernels::Stream& compute) {
  Sequence* sequence = rows_[static_cast<std::size_t>(row)];
  const predictor::DecodeBatch& batch = sequence->alone();
  model_.embed_next(batch.sequences, 1, hidden_.data(), compute);
  model_.project_qkv(0, 1, act_, hidden_.data(), compute);
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    // Slots in flight are read and written here.
    if (kind_.fetches_blocks) store_.wait(layer, compute);
    rope(layer, batch, compute);
    stream(attention_args(layer, batch, 0), std::span(&sequence, 1), compute);
    model_.finish_layer_and_next(layer, 1, act_, hidden_.data(),
                                 dense_logits_.as<float>() + row * model_.config().vocab_size,
                                 compute);
  }
}

// Of the choice, a KV head: the mean over its query heads. The report takes what is attended.
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
  const int kv_heads = model_.kv_shape().num_kv_heads;
  const std::size_t group = heads / static_cast<std::size_t>(kv_heads);
  for (int kv_head = 0; kv_head < kv_heads; ++kv_head) {
    const int index = layer * kv_heads + kv_head;
    const std::size_t first = static_cast<std::size_t>(kv_head) * group;
    double sum = 0;
    for (std::size_t head = first; head < first + group; ++head) {
      sum += std::exp(static_cast<double>(kept[head]) - all[head]);
    }
    const auto count = static_cast<double>(group);
    note_recall({row, index}, static_cast<float>(sum / count));
    sequence.report.recall_sum += is_dense({row, index}) ? count : sum;
    sequence.report.recall_count += static_cast<std::int64_t>(group);
  }
}

// A head that is found low attends all blocks at once, if there is room. What is no number is low.
void Decode::note_recall(const DenseHead& head, float recall) {
  if (!(recall >= 0)) recall = 0;
  Sequence& sequence = *rows_[static_cast<std::size_t>(head.row)];
  const float before =
      std::exchange(sequence.recalls[static_cast<std::size_t>(head.index)], recall);
  if (before < config_.min_recall || recall >= config_.min_recall) return;
  if (std::ssize(dense_heads_) < config_.max_dense_heads) {
    dense_heads_.push_back(head);
    ++sequence.report.dense_fallbacks;
  } else {
    ++sequence.report.dense_capped;
  }
}

// By earlier audits.
void Decode::choose_dense() {
  dense_heads_.clear();
  if (config_.min_recall == 0) return;
  std::vector<std::span<const float>> recalls;
  for (Sequence* row : rows_) {
    recalls.emplace_back(row->recalls);
    row->report.dense_capped += std::ranges::count_if(
        row->recalls, [this](float recall) { return recall < config_.min_recall; });
  }
  dense_heads_ = choose_dense_heads(recalls, config_.min_recall, config_.max_dense_heads);
  for (const DenseHead& head : dense_heads_) {
    KvReport& report = rows_[static_cast<std::size_t>(head.row)]->report;
    ++report.dense_fallbacks;
    --report.dense_capped;
  }
}

bool Decode::is_dense(const DenseHead& head) const {
  return std::ranges::find(dense_heads_, head) != dense_heads_.end();
}

// In place of what the layer's dense heads attended by choice. Their LSE and block maxima stay
// those of the choice: the next audit shall find what that is worth, and a history row has one
// normalizer.
void Decode::attend_densely(int layer, kernels::Stream& compute) {
  const int kv_heads = model_.kv_shape().num_kv_heads;
  for (const DenseHead& head : dense_heads_) {
    if (head.index / kv_heads != layer) continue;
    const int kv_head = head.index % kv_heads;
    kernels::DecodeAttentionArgs args = attention_args(layer, batch_, head.row);
    const int group = args.num_heads / kv_heads;
    const std::size_t skip = kernels::bytes_of(device_.activation_type()) *
                             static_cast<std::size_t>(kv_head * group * args.head_dim);
    args.q = static_cast<const std::byte*>(args.q) + skip;
    args.out = static_cast<std::byte*>(args.out) + skip;
    Sequence* sequence = rows_[static_cast<std::size_t>(head.row)];
    args.sequences = sequence->head_alone(kv_head);
    args.rows = 1;
    args.num_heads = group;
    args.num_kv_heads = 1;
    args.lse = exact_lse_.as<float>();  // not wanted
    stream(args, std::span(&sequence, 1), compute);
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
