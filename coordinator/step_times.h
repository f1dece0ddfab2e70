// StepTimes: what one worker group's steps cost, learned from those that were measured, so that
// prefill beside decoding sequences can be cut to a time.
//
// Prefill is counted in units: 1 for a token's pass through a layer, and in addition what its
// attention costs, position / attention_tokens. A step takes as long as its decoding sequences and
// its prefill units together, and where sequences come or go, as what that takes (memory, the
// store) beside. All costs follow a slower step at once and a faster one by a quarter: too little
// prefill in one step is made up for in the next, too much was waited for.
//
// No clock: times come in. For one thread. Example: tests/coordinator/step_times_test.cc
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

namespace foretoken::coordinator {

class StepTimes {
 public:
  using Microseconds = std::chrono::duration<double, std::micro>;
  struct Step {
    double prefill_units = 0;
    int num_decodes = 0;
    bool has_changes = false;  // sequences come or go
    Microseconds time{};
  };

  // attention_tokens: so many keys cost a query what the rest of its layer costs; > 0.
  explicit StepTimes(double attention_tokens) : attention_tokens_(attention_tokens) {}

  // Of tokens [begin, end) of a sequence in one layer.
  double units(std::int64_t begin, std::int64_t end) const;
  // The most tokens from `begin` on whose units in one layer are at most `units`.
  std::int64_t tokens_within(double units, std::int64_t begin) const;

  void learn(const Step& step);

  // Prefill units that fit into a step beside what decodes, so that it takes `bound`; 0 while their
  // cost isn't known. Where little or nothing of the bound is left, prefill gets a quarter of
  // decoding's time, at most as much as the bound, and the step takes longer: a prompt must not
  // starve.
  double units_beside_decodes(Microseconds bound, bool has_changes = false) const;

 private:
  double compute_us(const Step& step) const;

  double attention_tokens_;
  std::optional<double> decode_us_;  // of a step's decoding sequences
  std::optional<double> unit_us_;
  std::optional<double> change_us_;  // of a step's changes
};

}  // namespace foretoken::coordinator
