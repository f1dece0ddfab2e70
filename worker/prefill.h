// Prefill: a prompt's tokens through the model, layer by layer. One layer's KV is on the device at
// a time, in a scratch; before it is dropped it goes to the arena (and to slots, where the prompt
// fits them), and its last queries' attention starts the policy's history.
//
// The scratch is one, made at the start for the longest prompt, so that a prompt that was admitted
// can't run out of memory: one sequence is in prefill at a time.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "kernels/prefill_plans.h"
#include "worker/model.h"
#include "worker/sequence.h"

namespace foretoken::worker {

class Prefill {
 public:
  // max_rows: tokens that pass through a layer at once; max_tokens: the longest prompt.
  Prefill(Model& model, kernels::Device& device, kvstore::KvStore& store, predictor::Policy& policy,
          int max_rows, int max_tokens);

  // What its attention will be of, known before the model is loaded.
  static kernels::PrefillShape attention_shape(const ModelConfig& config, const Partition& part,
                                               int max_rows, int max_tokens);

  // Runs what prompts run, of every size of a chunk that differs, on zeros. A kernel is loaded when
  // it first runs, and that waits for all that runs then: the tokens of others would.
  void warm_up(kernels::Stream& stream);

  // Runs one work item; the first reused_tokens of the prompt come from the store. Items come in
  // the order of PrefillItem's comment, a sequence's first item ends what was in work before; a
  // broken order is the coordinator's fault: Exception(kInternal).
  // True when the prompt is done: then last_token() is the residual stream at its last token.
  bool run(Sequence& sequence, const PrefillItem& item, kernels::Stream& stream);

  // Of the prompt that run() just finished; valid until the next run().
  const void* last_token(const Sequence& sequence) const;
  // What run() has waited for the disk, for reused prefixes, since the last call; in tokens x
  // layers.
  struct Reading {
    std::int64_t tokens = 0;
    std::chrono::nanoseconds time{0};
  };
  Reading take_reading() { return std::exchange(reading_, {}); }
  // Waits for blocks on their way to the arena, or from there.
  void drain();
  Activations& activations() { return act_; }

 private:
  // K and V of a layer, [num_kv_heads, max_tokens, head_dim] each, whatever the prompt's length:
  // cuDNN plans its attention for one stride. Two layers': while one is computed, the one before
  // leaves for the arena on the copy stream, and then the reused prefix of the one behind comes
  // from there on the load stream.
  struct LayerKv {
    kernels::DeviceBuffer k, v;
    std::unique_ptr<kernels::Event> loaded;  // the prefix is there
    std::unique_ptr<kernels::Event> done;    // no op of the layer reads them any more
    std::unique_ptr<kernels::Event> packed;  // its blocks have left
  };

  void begin(Sequence& sequence, kernels::Stream& stream);
  void check_order(const Sequence& sequence, const PrefillItem& item) const;
  void run_layer(Sequence& sequence, int layer, int begin, int end, kernels::Stream& stream);
  void run_chunk(Sequence& sequence, int layer, int begin, int rows, kernels::Stream& stream);
  void attend_chunk(int layer, int begin, int rows, kernels::Stream& stream);
  void keep_tail(Sequence& sequence, int begin, int rows, kernels::Stream& stream);
  void begin_on_prefix(Sequence& sequence, int layer, kernels::Stream& stream);
  void load_prefix(Sequence& sequence, int layer);
  void await_prefix(kvstore::OutsizedKv& outsized, int layer, int tokens);
  void read_next_prefix(Sequence& sequence, int layer);
  void write_blocks(Sequence& sequence, int layer, kernels::Stream& stream);
  void start_history(Sequence& sequence, int layer, kernels::Stream& stream);
  void sketch_keys(Sequence& sequence, int layer, kernels::Stream& stream);
  void* hidden_at(const Sequence& sequence, int token) const;
  LayerKv& kv_of(int layer) { return kv_[static_cast<std::size_t>(layer) % kv_.size()]; }

  Model& model_;
  kernels::Device& device_;
  kvstore::KvStore& store_;
  predictor::Policy& policy_;
  const int max_tokens_;
  const kernels::PrefillShape attention_;
  Activations act_;
  kernels::DeviceBuffer lse_;  // [heads, max_rows] of the chunk

  // The scratch, and who has it.
  kernels::DeviceBuffer hidden_;  // [prompt - reused, hidden size]
  std::array<LayerKv, 2> kv_;     // of even and odd layers
  std::unique_ptr<kernels::Stream> copy_, load_;
  std::unique_ptr<kernels::Event> computed_;  // the layer's K and V stand
  kernels::DeviceBuffer tail_q_;              // [kHistoryRows, heads, head_dim] of the last queries
  kernels::DeviceBuffer tail_lse_;            // [heads, rows of the tail]
  kernels::DeviceBuffer block_max_;           // [heads, rows of the tail, columns]
  std::optional<SequenceId> current_;
  int next_layer_ = 0;
  int next_token_ = 0;
  Reading reading_;
};

}  // namespace foretoken::worker
