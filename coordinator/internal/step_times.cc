#include "coordinator/step_times.h"

#include <algorithm>
#include <cmath>

namespace foretoken::coordinator {
namespace {

constexpr double kFall = 0.25;  // of the way to a faster step
// Prefill's part of decoding's time that it always gets.
constexpr double kLeastShare = 0.25;

void follow(std::optional<double>& estimate, double sample) {
  estimate = !estimate || sample > *estimate ? sample : *estimate + kFall * (sample - *estimate);
}

}  // namespace

double StepTimes::units(std::int64_t begin, std::int64_t end) const {
  const auto tokens = static_cast<double>(end - begin);
  const double middle = static_cast<double>(begin + end) / 2;
  return tokens * (1 + middle / attention_tokens_);
}

// The root n of n (1 + (begin + n / 2) / attention_tokens) = units.
std::int64_t StepTimes::tokens_within(double units, std::int64_t begin) const {
  const double at_begin = 1 + static_cast<double>(begin) / attention_tokens_;
  const double root = std::sqrt(at_begin * at_begin + 2 * units / attention_tokens_);
  constexpr double kRounding = 1e-6;  // so that tokens_within(units(begin, end), begin) is them all
  return static_cast<std::int64_t>(attention_tokens_ * (root - at_begin) + kRounding);
}

double StepTimes::compute_us(const Step& step) const {
  return (step.num_decodes > 0 ? decode_us_.value_or(0) : 0) +
         step.prefill_units * unit_us_.value_or(0);
}

void StepTimes::learn(const Step& step) {
  const double us = step.time.count();
  if (step.has_changes && (step.prefill_units <= 0 || unit_us_)) {
    return follow(change_us_, std::max(0.0, us - compute_us(step)));
  }
  if (step.prefill_units <= 0) {
    if (step.num_decodes > 0) follow(decode_us_, us);
    return;
  }
  double prefill_us = us;
  if (step.num_decodes > 0 && decode_us_) {
    // With prefill beside it decoding took less than was thought, and how much less isn't known.
    if (us < *decode_us_) {
      decode_us_ = us;
      return;
    }
    prefill_us -= *decode_us_;
  }
  follow(unit_us_, prefill_us / step.prefill_units);
}

double StepTimes::units_beside_decodes(Microseconds bound, bool has_changes) const {
  if (!unit_us_) return 0;
  const double decode_us = decode_us_.value_or(0);
  const double change_us = has_changes ? change_us_.value_or(0) : 0;
  const double least_us = std::min(kLeastShare * decode_us, bound.count());
  const double room_us = std::max(bound.count() - decode_us - change_us, least_us);
  return room_us / std::max(*unit_us_, 1e-6);
}

}  // namespace foretoken::coordinator
