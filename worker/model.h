// Model: this rank's part of the weights, and a transformer layer in pieces, written once for every
// device and model family. What lies between the pieces, attention and the KV cache, differs
// between prefill (worker/prefill.h) and decode (worker/decode.h).
//
// Called by the step thread alone. Everything is enqueued; nothing waits.
#pragma once

#include <deque>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/model_config.h"
#include "common/result.h"
#include "common/safetensors.h"
#include "kernels/device.h"
#include "worker/collective.h"
#include "worker/load_progress.h"
#include "worker/partition.h"

namespace foretoken::worker {

// Where tensors come from: safetensors files, or random ones of the config's shape. For one thread.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // For the log: "the files".
  virtual std::string_view name() const = 0;
  // The whole tensor [shape]; the view lives as long as this does.
  virtual Result<TensorView> tensor(const std::string& name,
                                    std::span<const std::int64_t> shape) const = 0;
};
// name: a literal.
std::unique_ptr<WeightSource> make_file_source(ModelWeights weights,
                                               std::string_view name = "the files");
// Normal-like values of a fixed seed and a variance that keeps activations finite; norms are one.
std::unique_ptr<WeightSource> make_dummy_source(const ModelConfig& config);

// Buffers that one chunk of rows passes through.
struct Activations {
  // max_logit_rows: of one call of Model::logits.
  Activations(kernels::Device& device, const ModelConfig& config, const Partition& part,
              int max_rows, int max_logit_rows);
  int max_rows;
  int max_logit_rows;
  kernels::DeviceBuffer normed;    // [rows, hidden]
  kernels::DeviceBuffer qkv;       // [rows, (heads + 2 kv_heads) * head_dim]
  kernels::DeviceBuffer q;         // [rows, heads, head_dim]
  kernels::DeviceBuffer attn;      // [rows, heads, head_dim]
  kernels::DeviceBuffer gate_up;   // [rows, 2 * intermediate]
  kernels::DeviceBuffer mlp;       // [rows, intermediate]
  kernels::DeviceBuffer logits;    // [logit rows, vocab of this rank]; empty in a world of one
  kernels::DeviceBuffer gathered;  // [world, logit rows, widest vocab]; scratch of the collective
  // Sums of many rows go on beside what follows, where the ranks can. Whoever sets it calls
  // Model::end_sums().
  bool begins_sums = false;
};

class Model {
 public:
  // Reads this rank's part of every tensor; `progress` hears of each. Error: kModelFile. Throws
  // Exception(kExhausted) when it doesn't fit the device.
  static Result<std::unique_ptr<Model>> load(const ModelConfig& config, const WeightSource& weights,
                                             const Partition& part, kernels::Device& device,
                                             Collective& collective, LoadProgress& progress);
  ~Model();

  const ModelConfig& config() const { return config_; }
  const Partition& partition() const { return part_; }
  const kernels::KvShape& kv_shape() const { return kv_shape_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  float attention_scale() const { return attention_scale(config_); }
  // The same before it is loaded.
  static kernels::KvShape kv_shape(const ModelConfig& config, const Partition& part);
  static float attention_scale(const ModelConfig& config);
  std::size_t hidden_bytes(int rows) const;  // of the residual stream of some rows

  // hidden[rows, hidden size] = embedding of tokens[rows] (device).
  void embed(const TokenId* tokens, int rows, void* hidden, kernels::Stream& stream);
  // ... of each sequence's next token.
  void embed_next(const kernels::SequenceKv* sequences, int rows, void* hidden,
                  kernels::Stream& stream);
  // act.qkv = W_qkv norm(hidden).
  void project_qkv(int layer, int rows, Activations& act, const void* hidden,
                   kernels::Stream& stream);
  // The products of a layer with so many rows, as prefill has them, and no sums over ranks.
  void try_products(int layer, int rows, Activations& act, void* hidden, kernels::Stream& stream);
  // What rope_prefill and rope_decode have in common.
  kernels::RopeArgs rope_args(int layer, int rows, Activations& act) const;
  // hidden += W_o act.attn, then hidden += the MLP of its norm; sums over ranks. With
  // act.begins_sums, hidden is there for project_qkv() of the same rows, and for others after
  // end_sums().
  void finish_layer(int layer, int rows, Activations& act, void* hidden, kernels::Stream& stream);
  // finish_layer(), and what follows it: project_qkv() of the next layer, or logits() after the
  // last. As one op where the device can. REQUIRES: not act.begins_sums.
  void finish_layer_and_next(int layer, int rows, Activations& act, void* hidden, float* logits,
                             kernels::Stream& stream);
  void end_sums(kernels::Stream& stream);
  // The most that such a sum is of; 0 where chunks are too short for one.
  static std::size_t most_begun_bytes(const ModelConfig& config, int max_rows);
  // logits[rows, vocab], of all ranks. REQUIRES: rows <= act.max_logit_rows.
  void logits(int rows, Activations& act, const void* hidden, float* logits,
              kernels::Stream& stream);

 private:
  // Rows that are computed one part after the other, so that the sum of one goes on beside the
  // products of the next.
  struct Rows {
    int first;
    int count;
  };
  // A sum over the ranks that was begun, of these rows.
  struct Begun {
    std::byte* hidden;
    std::size_t bytes;
  };
  struct Layer {
    kernels::DeviceBuffer attention_norm, mlp_norm;  // [hidden]
    kernels::DeviceBuffer q_norm, k_norm;            // [head_dim], or empty
    std::unique_ptr<kernels::Weight> qkv, o, gate_up, down;
    kernels::DeviceBuffer qkv_bias, o_bias, gate_up_bias, down_bias;  // or empty
  };
  void embed(kernels::EmbedArgs args, void* hidden, kernels::Stream& stream);
  kernels::NormedInput norm(const kernels::DeviceBuffer& weight, const Activations& act) const;
  std::vector<Rows> parts(int rows, const Activations& act) const;
  static Rows first_half(int rows);
  // Ends the sums of these rows, and those that were begun before them.
  void end_sums_of(const std::byte* hidden, int rows, kernels::Stream& stream);
  void end_oldest_sum(kernels::Stream& stream);
  // hidden: of all rows.
  kernels::LinearArgs qkv_of(int layer, const Rows& rows, Activations& act,
                             const void* hidden) const;
  kernels::LinearArgs o_of(int layer, const Rows& rows, Activations& act, std::byte* hidden) const;
  kernels::LinearArgs gate_up_of(int layer, const Rows& rows, Activations& act,
                                 const std::byte* hidden) const;
  kernels::LinearArgs down_of(int layer, const Rows& rows, Activations& act,
                              std::byte* hidden) const;
  kernels::LinearArgs added_product(const kernels::Weight& weight,
                                    const kernels::DeviceBuffer& bias, const void* x,
                                    const Rows& rows, std::byte* hidden) const;
  kernels::LinearArgs logits_of(int rows, Activations& act, const void* hidden,
                                float* logits) const;
  void join_logits(int rows, Activations& act, float* logits, kernels::Stream& stream);
  std::size_t row_bytes(int columns) const;
  void add_up(std::byte* hidden, int rows, bool begins, kernels::Stream& stream);
  Model(const ModelConfig& config, const Partition& part, kernels::Device& device,
        Collective& collective);

  ModelConfig config_;
  Partition part_;
  kernels::Device& device_;
  Collective& collective_;
  kernels::KvShape kv_shape_;
  std::vector<int> vocab_widths_;    // of every rank
  kernels::DeviceBuffer embedding_;  // [vocab of this rank, hidden] of embedding_type_
  kernels::DataType embedding_type_ = kernels::DataType::kFp16;
  kernels::DeviceBuffer inv_freq_;
  kernels::DeviceBuffer final_norm_;
  std::unique_ptr<kernels::Weight> lm_head_;
  std::vector<Layer> layers_;
  std::deque<Begun> begun_;

  friend class ModelLoader;
};

}  // namespace foretoken::worker
