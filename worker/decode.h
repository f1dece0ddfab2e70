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
// A batch with a spilled sequence (kvstore/spilled_kv.h) gathers a layer when the layer comes: what
// is on NVMe is asked for when it is chosen, and there by then, or late (NvmeReads).
//
// Also here, since they are decode steps with something beside them: calibration (exact rows into
// the history) and the audit (how much attention the choice kept, how far the logits moved). Their
// steps are not recorded, and the audit waits for its figures.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "common/service_config.h"
#include "worker/model.h"
#include "worker/nvme_reads.h"
#include "worker/sampler.h"
#include "worker/sequence.h"

namespace foretoken::worker {

struct DecodeConfig {
  int max_rows = 8;
  int max_model_len = 0;
  int calibrate_every = 0;  // steps; 0: never
  int audit_every = 0;      // steps; 0: never
  bool record = true;       // false where ops wait for their stream (guard_arena)
  OnLate on_late = OnLate::kWait;
};

class Decode {
 public:
  Decode(const DecodeConfig& config, Model& model, kernels::Device& device, kvstore::KvStore& store,
         predictor::Policy& policy, Sampler& sampler);
  ~Decode();

  // After prefill: the policy's first choice. REQUIRES: the sequence's length is stored.
  void begin(Sequence& sequence, kernels::Stream& compute);

  // The token after each sequence's last one, whose KV is stored on the way.
  std::unique_ptr<Sampler::Draw> step(std::span<Sequence* const> rows, kernels::Stream& compute);

  // Waits for copies in flight, so that a sequence may be freed or its slabs published.
  void drain();

 private:
  struct Tables;  // the batch, as the device sees it

  void bind(std::span<Sequence* const> rows, kernels::Stream& compute);
  void run(kernels::Stream& compute);
  void forward(kernels::Stream& compute);
  void start_fetches(kernels::Stream& compute);
  int layers_to_fetch(int layer) const;
  void fetch_now(int layer, kernels::Stream& compute);
  void run_layer(int layer, kernels::Stream& compute);
  void rope(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute);
  void fetch_at_query(int layer, kernels::Stream& compute);
  void stream(const kernels::DecodeAttentionArgs& args, std::span<Sequence* const> rows,
              kernels::Stream& compute);
  void attend(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute);
  void observe_exactly(int layer, kernels::Stream& compute);
  void observe_attended(kernels::Stream& compute);
  void write_through();
  void choose();
  bool recordable() const;
  // Exact rows of one row of the batch (keys alone): exact_max_, exact_lse_.
  void score_exactly(int layer, int row, kernels::Stream& compute);
  void dense_pass(int row, kernels::Stream& compute);
  void measure_recall(int layer, int row, kernels::Stream& compute);
  void measure_kl(int row, kernels::Stream& compute);
  void count_late(int layer, kernels::Stream& compute);
  bool calibrates(const Sequence& sequence, int layer) const;
  bool any_calibrates(int layer) const;
  predictor::AttentionRows attended_rows(int layer, int num_layers) const;
  bool audits(const Sequence& sequence) const;
  kernels::DecodeAttentionArgs attention_args(int layer, const predictor::DecodeBatch& batch,
                                              int first_row) const;
  predictor::AttentionRows exact_rows(int row) const;

  const DecodeConfig config_;
  Model& model_;
  kernels::Device& device_;
  kvstore::KvStore& store_;
  predictor::Policy& policy_;
  Sampler& sampler_;
  std::unique_ptr<kernels::Stream> copy_;
  std::unique_ptr<kernels::Stream> side_;     // a step's choice, beside its logits
  std::unique_ptr<kernels::Event> resolved_;  // compute: fetch lists stand
  std::unique_ptr<kernels::Event> written_;   // copy: write-through has read its slots
  std::unique_ptr<kernels::Event> advanced_;  // compute: lengths count the step's token
  std::unique_ptr<kernels::Event> chosen_;    // side: tables and fetch lists of the coming step
  Activations act_;
  kernels::DeviceBuffer hidden_;     // [max_rows, hidden]
  kernels::DeviceBuffer logits_;     // [max_rows, vocab]
  kernels::DeviceBuffer lse_;        // [layers, rows, heads]
  kernels::DeviceBuffer block_max_;  // [layers, rows, heads, pitch], by slot; where it is wanted
  kernels::DeviceBuffer exact_lse_;  // [heads]
  kernels::DeviceBuffer exact_max_;  // [heads, exact_pitch_], by block
  int pitch_ = 0;
  int exact_pitch_ = 0;

  std::unique_ptr<Tables> tables_;
  predictor::DecodeBatch batch_;
  std::vector<Sequence*> rows_;
  bool streams_all_ = false;     // of some row
  bool spills_ = false;          // of some row
  bool audits_ = false;          // some row, in this step
  bool fetches_blocks_ = false;  // otherwise every block has a slot, and is there
  // Steps by (rows, streams_all_): null after the first, which is not recorded.
  std::map<std::pair<int, bool>, std::unique_ptr<kernels::Graph>> graphs_;

  kernels::DeviceBuffer dense_logits_;  // [max_rows, vocab], of audited rows
  std::vector<std::int32_t> counts_;    // host copy of a sequence's counters
  NvmeReads nvme_reads_;
};

}  // namespace foretoken::worker
