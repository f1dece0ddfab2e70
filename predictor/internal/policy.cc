#include "predictor/policy.h"

#include <array>
#include <string>
#include <utility>

#include "common/check.h"
#include "predictor/internal/policies.h"
#include "predictor/weights.h"

namespace foretoken::predictor {
namespace {

constexpr std::array<std::pair<std::string_view, PolicyKind>, 5> kNames = {{
    {"full", PolicyKind::kFull},
    {"streaming-llm", PolicyKind::kStreamingLlm},
    {"attention-predictor", PolicyKind::kAttentionPredictor},
    {"oracle", PolicyKind::kOracle},
    {"auto", PolicyKind::kAuto},
}};

// That a GPU's choice unites (kernels/cuda/map_state.cuh).
constexpr int kMostMapsPerHead = 128;

// Critical blocks a map and a KV head: k = (budget - sink - local) / 16.
Maps maps_for(const PolicyConfig& config, const PolicyShape& shape) {
  Maps maps;
  if (config.kind == PolicyKind::kFull) return maps;
  maps.top_k = (config.budget_tokens - kSinkTokens - kLocalTokens) / kBlockTokens;
  maps.max_per_head = maps.top_k;
  const bool has_maps = config.kind != PolicyKind::kStreamingLlm;
  if (has_maps && config.predict_per == PredictPer::kQueryHead) {
    maps.per_kv_head = shape.num_heads / shape.kv.num_kv_heads;
    if (config.budget_per == BudgetPer::kQueryHead) maps.max_per_head *= maps.per_kv_head;
  }
  return maps;
}

}  // namespace

std::optional<PolicyKind> policy_from_name(std::string_view name) {
  for (const auto& [known, kind] : kNames) {
    if (known == name) return kind;
  }
  return std::nullopt;
}

std::optional<Calibration> calibration_from_name(std::string_view name,
                                                 const kernels::Device& device) {
  if (name == "exact") return Calibration::kExact;
  if (name == "sketch") return Calibration::kSketch;
  if (name == "none") return Calibration::kNone;
  if (name != "auto") return std::nullopt;
  return device.info().shares_host_memory ? Calibration::kExact : Calibration::kNone;
}

std::string_view name_of(PolicyKind kind) {
  for (const auto& [name, known] : kNames) {
    if (known == kind) return name;
  }
  check_failed("a PolicyKind has a name", __FILE__, __LINE__, check_values(static_cast<int>(kind)));
}

Result<std::unique_ptr<Policy>> make_policy(const PolicyConfig& config, const PolicyShape& shape,
                                            kernels::Device& device) {
  FT_CHECK(shape.kv.num_kv_heads > 0 && shape.num_heads % shape.kv.num_kv_heads == 0,
           shape.num_heads, shape.kv.num_kv_heads);
  constexpr int kLeast = kSinkTokens + kLocalTokens + kBlockTokens;
  if (config.kind != PolicyKind::kFull && config.budget_tokens < kLeast) {
    return Error{ErrorCode::kConfig, "a KV budget of " + std::to_string(config.budget_tokens) +
                                         " tokens is below sink (" + std::to_string(kSinkTokens) +
                                         ") + local (" + std::to_string(kLocalTokens) +
                                         ") + one block (" + std::to_string(kBlockTokens) +
                                         "); give at least " + std::to_string(kLeast)};
  }
  const PolicySetup setup{config, shape, maps_for(config, shape), &device};
  if (setup.maps.per_kv_head > kMostMapsPerHead) {
    return Error{ErrorCode::kConfig,
                 "a map a query head is for at most " + std::to_string(kMostMapsPerHead) +
                     " query heads a KV head, and this model has " +
                     std::to_string(setup.maps.per_kv_head) + "; use --predict-per kv-head"};
  }
  switch (config.kind) {
    case PolicyKind::kFull:
      return std::unique_ptr<Policy>(std::make_unique<FullPolicy>(setup));
    case PolicyKind::kStreamingLlm:
      return std::unique_ptr<Policy>(std::make_unique<StreamingLlmPolicy>(setup));
    case PolicyKind::kOracle:
      return std::unique_ptr<Policy>(std::make_unique<OraclePolicy>(setup));
    case PolicyKind::kAttentionPredictor:
    case PolicyKind::kAuto:
      break;
  }
  FT_ASSIGN_OR_RETURN(const kernels::PredictorWeights weights,
                      read_weights(config.weights.empty() ? published_weights() : config.weights));
  return std::unique_ptr<Policy>(std::make_unique<AttentionPredictorPolicy>(setup, weights));
}

}  // namespace foretoken::predictor
