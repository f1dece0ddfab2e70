// Decode: one token of each sequence of a batch. At its head the gathers of what the last step
// predicted are started, layer by layer on the copy stream; each layer joins its own, attends what
// is resident, and leaves its attention row to the policy. At its tail the policy chooses the
// coming step's blocks, and the resolver turns the choice into fetch lists.
//
// Also here, since they are decode steps with something beside them: calibration (exact rows into
// the history) and the audit (how much attention the choice kept, how far the logits moved).
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "common/service_config.h"
#include "worker/model.h"
#include "worker/sequence.h"

namespace foretoken::worker {

struct DecodeConfig {
  int max_rows = 8;
  int max_model_len = 0;
  int calibrate_every = 0;  // steps; 0: never
  int audit_every = 0;      // steps; 0: never
};

class Decode {
 public:
  Decode(const DecodeConfig& config, Model& model, kernels::Device& device, kvstore::KvStore& store,
         predictor::Policy& policy);

  // After prefill: the policy's first choice. REQUIRES: the sequence's length is stored.
  void begin(Sequence& sequence, kernels::Stream& compute);

  // The logits [rows, vocab] (device) that follow each sequence's last token, whose KV is stored.
  // Valid until the next call. finish() must follow, when the logits have been used.
  const float* step(std::span<Sequence* const> rows, kernels::Stream& compute);
  // The tail: lengths, write-through, choice, fetch lists.
  void finish(kernels::Stream& compute);

  // Waits for copies in flight, so that a sequence may be freed or its slabs published.
  void drain();

 private:
  void bind(std::span<Sequence* const> rows, kernels::Stream& compute);
  void start_fetches(kernels::Stream& compute);
  void embed(std::span<Sequence* const> rows, kernels::Stream& compute);
  void run_layer(int layer, kernels::Stream& compute);
  void fetch_at_query(int layer, kernels::Stream& compute);
  void attend(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute);
  void observe(int layer, kernels::Stream& compute);
  // Exact rows of one row of the batch (keys alone): exact_max_, exact_lse_.
  void score_exactly(int layer, int row, kernels::Stream& compute);
  void dense_pass(int row, kernels::Stream& compute);
  void measure_recall(int layer, int row, kernels::Stream& compute);
  void measure_kl(int row, kernels::Stream& compute);
  void count_late(int layer, kernels::Stream& compute);
  void count_fetches(kernels::Stream& compute);
  bool calibrates(const Sequence& sequence, int layer) const;
  bool audits(const Sequence& sequence) const;
  kernels::DecodeAttentionArgs attention_args(int layer, const predictor::DecodeBatch& batch,
                                              int first_row) const;
  predictor::AttentionRows exact_rows(int row) const;

  const DecodeConfig config_;
  Model& model_;
  kernels::Device& device_;
  kvstore::KvStore& store_;
  predictor::Policy& policy_;
  std::unique_ptr<kernels::Stream> copy_;
  std::unique_ptr<kernels::Event> resolved_;  // compute: fetch lists stand
  std::unique_ptr<kernels::Event> written_;   // copy: the last write-through has read its slots
  std::unique_ptr<kernels::Event> advanced_;  // compute: lengths count the step's token
  Activations act_;
  kernels::DeviceBuffer hidden_, delta_;  // [max_rows, hidden]
  kernels::DeviceBuffer logits_;          // [max_rows, vocab]
  kernels::DeviceBuffer lse_;             // [max_rows, heads]
  kernels::DeviceBuffer block_max_;       // [max_rows, heads, pitch], by slot
  kernels::DeviceBuffer exact_lse_;       // [heads]
  kernels::DeviceBuffer exact_max_;       // [heads, exact_pitch_], by block
  int pitch_ = 0;
  int exact_pitch_ = 0;

  // The batch as device arrays, and its rows.
  kernels::DeviceBuffer sequences_, histories_, selections_, fetches_, num_columns_;
  predictor::DecodeBatch batch_;
  std::vector<Sequence*> rows_;
  bool streams_all_ = false;

  kernels::DeviceBuffer dense_logits_;  // [max_rows, vocab], of audited rows
  std::vector<std::int32_t> counts_;    // host copy of a sequence's counters
};

}  // namespace foretoken::worker
