// The policies behind predictor/policy.h. One class a rule; BasePolicy holds what all share.
#pragma once

#include <memory>
#include <optional>

#include "common/check.h"
#include "predictor/internal/policy_state.h"
#include "predictor/policy.h"

namespace foretoken::predictor {

// What the factory has worked out from configuration and shape.
struct PolicySetup {
  PolicyConfig config;
  PolicyShape shape;
  Maps maps;
  kernels::Device* device = nullptr;
};

// A policy that never looks and never chooses; each rule overrides what it does.
class BasePolicy : public Policy {
 public:
  BasePolicy(const PolicySetup& setup, std::optional<kernels::HistoryType> history)
      : setup_(setup), states_(*setup.device, setup.shape, setup.maps, history) {}

  const PolicyConfig& config() const override { return setup_.config; }
  std::optional<int> selected_per_head() const override { return setup_.maps.max_per_head; }
  bool spills() const override { return config().kind == PolicyKind::kAuto; }
  std::size_t state_bytes(int max_tokens) const override { return states_.bytes(max_tokens); }
  std::unique_ptr<PolicyState> admit(int max_tokens, kernels::Stream& stream) override {
    return states_.make(max_tokens, stream);
  }

  bool observes() const override { return false; }
  std::size_t block_max_bytes(int num_slots) const override;
  void observe_prefill(const kernels::HistoryState*, int, const AttentionRows&,
                       kernels::Stream&) override {
    FT_CHECK(observes());
  }
  void observe_decode(const DecodeBatch&, int, const AttentionRows&, kernels::Stream&) override {
    FT_CHECK(observes());
  }
  void select_ahead(const DecodeBatch&, kernels::Stream&) override {}
  bool selects_at_query() const override { return false; }
  void select_at_query(const DecodeBatch&, int, const AttentionRows&, kernels::Stream&) override {
    FT_CHECK(selects_at_query());
  }

 protected:
  kernels::Device& device() const { return *setup_.device; }
  const PolicySetup& setup() const { return setup_; }

 private:
  PolicySetup setup_;
  PolicyStateMaker states_;
};

// Every block is resident.
class FullPolicy final : public BasePolicy {
 public:
  explicit FullPolicy(const PolicySetup& setup) : BasePolicy(setup, std::nullopt) {}
  std::optional<int> selected_per_head() const override { return std::nullopt; }
};

// Sink and the latest tokens (arXiv 2309.17453).
class StreamingLlmPolicy final : public BasePolicy {
 public:
  explicit StreamingLlmPolicy(const PolicySetup& setup) : BasePolicy(setup, std::nullopt) {}
  void select_ahead(const DecodeBatch& batch, kernels::Stream& stream) override;
};

// The blocks of the step's own greatest attention: what no predictor can beat.
class OraclePolicy final : public BasePolicy {
 public:
  explicit OraclePolicy(const PolicySetup& setup) : BasePolicy(setup, std::nullopt) {}
  bool selects_at_query() const override { return true; }
  void select_at_query(const DecodeBatch& batch, int layer, const AttentionRows& exact,
                       kernels::Stream& stream) override;
};

// The CNN over the attention history (arXiv 2502.04077).
class AttentionPredictorPolicy final : public BasePolicy {
 public:
  AttentionPredictorPolicy(const PolicySetup& setup, const kernels::PredictorWeights& weights)
      : BasePolicy(setup, setup.config.history_type),
        predictor_(setup.device->make_predictor(weights)) {}

  bool observes() const override { return true; }
  void observe_prefill(const kernels::HistoryState* state, int layer, const AttentionRows& rows,
                       kernels::Stream& stream) override;
  void observe_decode(const DecodeBatch& batch, int layer, const AttentionRows& rows,
                      kernels::Stream& stream) override;
  void select_ahead(const DecodeBatch& batch, kernels::Stream& stream) override;

 private:
  kernels::HistoryAppendArgs append_args(int layer, const AttentionRows& rows) const;

  std::unique_ptr<kernels::Predictor> predictor_;
};

}  // namespace foretoken::predictor
