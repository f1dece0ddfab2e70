// Policy: which KV blocks the coming token will need. One door for the AttentionPredictor and the
// rules it is compared with; each is real and can be served with.
//
// A policy looks at attention (observe_*), and chooses in one of two phases:
//   select_ahead     from the past alone, so its blocks are fetched before they are needed
//   select_at_query  knows the step's own query: its fetch stands in the step's way
// A choice is at most selected_per_head() blocks a KV head beside sink and local window.
//
// A Policy belongs to one rank, and is called by its step thread alone. Device work is enqueued on
// the given stream. Example: tests/predictor/policy_test.cc
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string_view>

#include "common/result.h"
#include "kernels/device.h"

namespace foretoken::predictor {

// kAuto: all blocks, until the device is needed for other sequences; from then on as
// kAttentionPredictor.
enum class PolicyKind { kFull, kStreamingLlm, kAttentionPredictor, kOracle, kAuto };
std::optional<PolicyKind> policy_from_name(std::string_view name);  // "attention-predictor", ...
std::string_view name_of(PolicyKind kind);

enum class PredictPer { kKvHead, kQueryHead };
enum class BudgetPer { kKvHead, kQueryHead };  // what kv_budget counts when maps are a query head's
enum class HistoryFill { kZero, kHold };
// Where the blocks of `full` lie: on the device if all of them fit, or in host memory alone, from
// which each step's attention streams them. kAlways: on the device, or the sequence is refused.
enum class Residency { kWhereItFits, kNever, kAlways };
// Where a calibration's row over all blocks comes from: there are none; all keys; or all keys'
// sketches (kernels/key_sketch.h), which sequences then keep. The worker makes these rows.
enum class Calibration { kNone, kExact, kSketch };
// "exact", "sketch", "none", or "auto": exact where the device's memory is the host's, so that keys
// cross no link; none where they would (docs/decisions/004-calibration.md). nullopt: another name.
std::optional<Calibration> calibration_from_name(std::string_view name,
                                                 const kernels::Device& device);

struct PolicyConfig {
  PolicyKind kind = PolicyKind::kFull;
  int budget_tokens = 1024;  // sink + local + critical
  PredictPer predict_per = PredictPer::kKvHead;
  BudgetPer budget_per = BudgetPer::kQueryHead;
  kernels::HistoryType history_type = kernels::HistoryType::kBf16;
  HistoryFill history_fill = HistoryFill::kZero;
  Residency residency = Residency::kWhereItFits;
  Calibration calibration = Calibration::kNone;  // of a policy that observes
  // A benchmark's: what the predictor chose is replaced by a trace in which this share of the
  // blocks is new from step to step (kernels/trace_choice.h). Its work is done all the same.
  std::optional<float> trace_churn = {};
  std::filesystem::path weights;  // safetensors of the CNN; empty: the published Llama-3.1 weights
};

// This rank's share of the model.
struct PolicyShape {
  kernels::KvShape kv;
  int num_heads = 0;  // query heads of this rank
};

// What a policy keeps for one sequence: allocated at admission for its greatest length.
struct PolicyState {
  kernels::HistoryState history{};  // device pointers; num_layers == 0 where the policy has none
  kernels::Selection selection{};   // device pointers; the policy's choice for the coming step
  kernels::DeviceBuffer memory;     // owns what the two point to
};

// The sequences of a decode step, as device arrays [rows].
struct DecodeBatch {
  int rows = 0;
  const kernels::SequenceKv* sequences = nullptr;
  kernels::HistoryState* histories = nullptr;
  kernels::Selection* selections = nullptr;
  bool scores_segments = false;  // some selection wants segment_scores
};

// What attention left behind, of one layer or of several: logits' block maxima and LSE.
struct AttentionRows {
  // [num_layers, sequences, num_heads, rows, pitch] device, by block; null: a decode step's, which
  // lie by slot in its sequences (SequenceKv::block_max).
  const float* block_max = nullptr;
  const float* lse = nullptr;  // [num_layers, sequences, num_heads, rows] device
  int rows = 1;
  int pitch = 0;
  const std::int32_t* num_columns = nullptr;  // [sequences] device: ceil(tokens attended / 16)
  int num_layers = 1;
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual const PolicyConfig& config() const = 0;

  // Blocks a KV head that it may choose; nullopt: every block is resident, there is no choice.
  virtual std::optional<int> selected_per_head() const = 0;
  // Whether a sequence may have all its blocks on the device (and so no choice) until it spills.
  virtual bool spills() const = 0;
  // Device bytes that admit() takes for a sequence of at most max_tokens.
  virtual std::size_t state_bytes(int max_tokens) const = 0;
  // Throws Exception(kExhausted) when the device is full. State starts empty.
  virtual std::unique_ptr<PolicyState> admit(int max_tokens, kernels::Stream& stream) = 0;

  // Whether it wants to see attention rows at all (observe_* are not called otherwise).
  virtual bool observes() const = 0;
  // Device bytes of SequenceKv::block_max; 0 where it doesn't observe.
  virtual std::size_t block_max_bytes(int num_slots) const = 0;
  Calibration calibration() const { return observes() ? config().calibration : Calibration::kNone; }
  // The last queries of the prompt, oldest first, up to 64, by block. state: one sequence.
  virtual void observe_prefill(const kernels::HistoryState* state, int layer,
                               const AttentionRows& rows, kernels::Stream& stream) = 0;
  // One decode step's rows of the layers from `layer` on, for every sequence of the batch.
  virtual void observe_decode(const DecodeBatch& batch, int layer, const AttentionRows& rows,
                              kernels::Stream& stream) = 0;

  // Chooses for the coming step (position *length), all layers. Once a step, after all rows.
  virtual void select_ahead(const DecodeBatch& batch, kernels::Stream& stream) = 0;

  // Whether select_at_query is to be called, a layer, with the exact rows of this step.
  virtual bool selects_at_query() const = 0;
  virtual void select_at_query(const DecodeBatch& batch, int layer, const AttentionRows& exact,
                               kernels::Stream& stream) = 0;
};

// Error: kConfig for a budget below sink + local + one block; kModelFile for bad CNN weights.
Result<std::unique_ptr<Policy>> make_policy(const PolicyConfig& config, const PolicyShape& shape,
                                            kernels::Device& device);

}  // namespace foretoken::predictor
