// Prefill: a prompt's tokens through the model, layer by layer. One layer's KV is on the device at
// a time, in a scratch; before it is dropped it goes to the arena (and to slots, where the prompt
// fits them), and its last queries' attention starts the policy's history.
#pragma once

#include "worker/model.h"
#include "worker/sequence.h"

namespace foretoken::worker {

class Prefill {
 public:
  // max_rows: tokens that pass through a layer at once.
  Prefill(Model& model, kernels::Device& device, kvstore::KvStore& store, predictor::Policy& policy,
          int max_rows);

  // Sets up the scratch; the first reused_tokens of the prompt come from the store.
  void start(Sequence& sequence, int reused_tokens, kernels::Stream& stream);

  // Runs one work item. Items come in the order of PrefillItem's comment; a broken order is the
  // coordinator's fault: Exception(kInternal).
  // True when the prompt is done: then last_token() holds the residual of its last token.
  bool run(Sequence& sequence, const PrefillItem& item, kernels::Stream& stream);

  // Of the prompt that run() just finished; valid until the next start().
  Residual last_token(Sequence& sequence) const;
  Activations& activations() { return act_; }

 private:
  void run_layer(Sequence& sequence, int layer, int begin, int end, kernels::Stream& stream);
  void run_chunk(Sequence& sequence, int layer, int begin, int rows, kernels::Stream& stream);
  void keep_tail(Sequence& sequence, int begin, int rows, kernels::Stream& stream);
  void load_prefix(Sequence& sequence, int layer, kernels::Stream& stream);
  void finish_layer(Sequence& sequence, int layer, kernels::Stream& stream);

  Model& model_;
  kernels::Device& device_;
  kvstore::KvStore& store_;
  predictor::Policy& policy_;
  Activations act_;
  kernels::DeviceBuffer lse_;          // [heads, max_rows] of the chunk
  kernels::DeviceBuffer num_columns_;  // [1]
};

}  // namespace foretoken::worker
