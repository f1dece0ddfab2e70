// Decode: one token of each sequence of a batch. At its head the gathers of what the last step
// predicted are started, some layers at a time on the copy stream; a layer joins its own, attends
// what is resident, and notes its attention row. At its tail the token is drawn; beside that, since
// it doesn't depend on the token, the policy takes the rows of all layers and chooses the coming
// step's blocks, and the resolver turns the choice into fetch lists.
//
// A step only enqueues, so the host may enqueue the next one before this one has run. Everything
// that changes from step to step lies in device memory; so one step of a number of rows is
// recorded, and launched for all later ones.
//
// A batch with an outsized sequence (kvstore/outsized_kv.h) has the host in its way, which reads
// from NVMe what was chosen (NvmeReads). On a GPU the host waits for the step before, and has all
// of the step's blocks in memory when it launches it: the step itself is like any other. Where they
// don't fit at once, or some attention streams all blocks, and on a CPU, whose ops have run when
// their calls return, a layer's come when the layer does.
//
// Also here, since they are decode steps with something beside them: calibration (rows over all
// blocks into the history, from their keys or from sketches of them), the audit (how much attention
// the choice kept, how far the logits moved), and heads that attend all blocks until an audit finds
// that their choice keeps enough again. The audit waits for its figures, so neither its steps nor
// those of such heads are recorded. Calibration is staggered: of M = calibrate_every steps, each
// calibrates every M-th layer, so that none pays for all.
#pragma once

#include <compare>
#include <memory>
#include <span>
#include <vector>

#include "common/service_config.h"
#include "worker/dense_heads.h"
#include "worker/model.h"
#include "worker/nvme_reads.h"
#include "worker/recorded_steps.h"
#include "worker/sampler.h"
#include "worker/sequence.h"

namespace foretoken::worker {

struct DecodeConfig {
  int max_rows = 8;
  int max_model_len = 0;
  int calibrate_every = 0;  // steps from one calibration of a layer to the next; 0: never
  int audit_every = 0;      // steps; 0: never
  float min_recall = 0;     // of a head, below which it attends all blocks; 0: never
  int max_dense_heads = 0;  // ... at most so many in a step
  bool record = true;       // false where ops wait for their stream (guard_arena)
  OnLate on_late = OnLate::kWait;
};

class Decode {
 public:
  Decode(const DecodeConfig& config, Model& model, kernels::Device& device, kvstore::KvStore& store,
         predictor::Policy& policy, Sampler& sampler);
  ~Decode();

  // After prefill, or a spill: the policy's first choice. Waits for nothing.
  void begin(Sequence& sequence, kernels::Stream& compute);
  // A dense sequence leaves the device, but for the budget's blocks; from here on it is predicted.
  // REQUIRES: nothing of it is in flight.
  void spill(Sequence& sequence, kernels::Stream& compute);

  // The token after each sequence's last one, whose KV is stored on the way.
  Sampler::Draw* step(std::span<Sequence* const> rows, kernels::Stream& compute);

  // Waits for copies in flight, so that a sequence may be freed or its slabs published.
  void drain();

  // Whether its next step is an audit, which waits for the device.
  bool audits(const Sequence& sequence) const;

 private:
  struct Tables;  // the batch, as the device sees it
  // What of a step is not in device memory: steps that share it are the same recorded work.
  struct Kind {
    int rows = 0;
    bool streams_all = false;      // of some row
    bool fetches_blocks = false;   // otherwise every block has a slot, and is there
    bool scores_segments = false;  // for what is on NVMe, of some row
    int first_calibrated = 0;      // layer, of the first row; the others' must be the same
    auto operator<=>(const Kind&) const = default;
  };

  Kind kind_of(std::span<Sequence* const> rows) const;
  void bind(std::span<Sequence* const> rows, kernels::Stream& compute);
  void run(kernels::Stream& compute);
  void forward(kernels::Stream& compute);
  void await_last_step(std::span<Sequence* const> rows);
  bool streams_somewhere() const;
  bool brings_by_layer();
  void list_fetches(kernels::Stream& stream);
  void start_fetches(kernels::Stream& compute);
  void fetch_now(int layer, kernels::Stream& compute);
  void attend_layer(int layer, kernels::Stream& compute);
  void end_attention(kernels::Stream& compute);
  void rope(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute);
  void fetch_at_query(int layer, kernels::Stream& compute);
  void stream(const kernels::DecodeAttentionArgs& args, std::span<Sequence* const> rows,
              kernels::Stream& compute);
  void attend(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute);
  void observe_calibrated(int layer, kernels::Stream& compute);
  void observe_attended(kernels::Stream& compute);
  void write_through();
  void choose();
  bool recordable() const;
  // Rows over all blocks of one row of the batch: exact_max_, exact_lse_. From their keys, or as
  // calibration has them.
  void score_exactly(int layer, int row, kernels::Stream& compute);
  void score_for_calibration(int layer, int row, kernels::Stream& compute);
  void count_calibration_bytes(Sequence& sequence) const;
  void dense_pass(int row, kernels::Stream& compute);
  void measure_recall(int layer, int row, kernels::Stream& compute);
  void note_recall(const DenseHead& head, float recall);
  void choose_dense();
  bool is_dense(const DenseHead& head) const;
  void attend_densely(int layer, kernels::Stream& compute);
  void measure_kl(int row, kernels::Stream& compute);
  void count_late(int layer, kernels::Stream& compute);
  int first_calibrated(const Sequence& sequence) const;
  bool calibrates(const Sequence& sequence, int layer) const;
  bool any_calibrates(int layer) const;
  predictor::DecodeBatch one_of_batch(int row) const;
  predictor::AttentionRows attended_rows(int layer, int num_layers) const;
  kernels::DecodeAttentionArgs attention_args(int layer, const predictor::DecodeBatch& batch,
                                              int first_row) const;
  kernels::DecodeAttentionArgs all_blocks_args(int layer, int row) const;
  predictor::AttentionRows exact_rows(int row) const;

  const DecodeConfig config_;
  Model& model_;
  kernels::Device& device_;
  kvstore::KvStore& store_;
  predictor::Policy& policy_;
  Sampler& sampler_;
  std::unique_ptr<kernels::Stream> copy_;
  std::unique_ptr<kernels::Stream> side_;     // a step's choice, beside its last products
  std::unique_ptr<kernels::Event> resolved_;  // compute: fetch lists stand
  std::unique_ptr<kernels::Event> written_;   // copy: write-through has read its slots
  std::unique_ptr<kernels::Event> advanced_;  // compute: lengths count the step's token
  std::unique_ptr<kernels::Event> chosen_;    // side: tables and fetch lists of the coming step
  std::unique_ptr<kernels::Event> listed_;    // compute: ... which the host has, where outsized
  Activations act_;
  kernels::DeviceBuffer hidden_;     // [max_rows, hidden]
  kernels::DeviceBuffer logits_;     // [max_rows, vocab]
  kernels::DeviceBuffer lse_;        // [layers, rows, heads]
  kernels::DeviceBuffer kept_;       // of a sequence that spills: [layers, KV heads, kLocalBlocks]
  kernels::DeviceBuffer exact_lse_;  // [heads]
  kernels::DeviceBuffer exact_max_;  // [heads, exact_pitch_], by block
  int exact_pitch_ = 0;

  std::unique_ptr<Tables> tables_;
  predictor::DecodeBatch batch_;
  std::vector<Sequence*> rows_;
  Kind kind_;
  bool outsized_ = false;               // some row
  bool by_layer_ = false;               // gathers, beside the host
  bool audits_ = false;                 // some row, in this step
  std::vector<DenseHead> dense_heads_;  // of the step
  RecordedSteps<Kind> recorded_;

  kernels::DeviceBuffer dense_logits_;  // [max_rows, vocab], of audited rows
  std::vector<std::int32_t> counts_;    // host copy of a sequence's counters
  NvmeReads nvme_reads_;
};

}  // namespace foretoken::worker
