// Pieces of a softmax to base 2 over rows of scores.
#if defined(FORETOKEN_SIMD_SOFTMAX_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FORETOKEN_SIMD_SOFTMAX_INL_H
#undef FORETOKEN_SIMD_SOFTMAX_INL_H
#else
#define FORETOKEN_SIMD_SOFTMAX_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/simd/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

constexpr float kLog2E = 1.44269504088896340736F;
constexpr float kLn2 = 0.69314718055994530942F;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Natural log of sum * 2^maximum.
HWY_INLINE float natural_lse(float maximum, float sum) { return (maximum + std::log2(sum)) * kLn2; }

HWY_INLINE float max_of_row(const float* row, int count) {
  const FloatTag d;
  auto highest = hn::Set(d, kMinusInfinity);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) highest = hn::Max(highest, hn::LoadU(d, row + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, highest));
  for (; i < count; ++i) result = std::max(result, row[i]);
  return result;
}

HWY_INLINE void scale_row(float* row, int count, float factor) {
  const FloatTag d;
  for (int i = 0; i < count; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, row + i), hn::Set(d, factor)), d, row + i);
  }
}

// row = 2^(row - highest); returns the sum, in the order of 16 partial sums on every target.
// Up to the next multiple of 16, what follows count becomes 0. REQUIRES: room for that.
HWY_INLINE float exp2_row(float* row, int count, float highest) {
  const FloatTag d;
  constexpr int kSums = 16 / kLanes;
  FloatVec sums[kSums];
  for (auto& sum : sums) sum = hn::Zero(d);
  for (int i = count; i % 16 != 0; ++i) row[i] = kMinusInfinity;
  for (int i = 0; i < count; i += 16) {
    for (int s = 0; s < kSums; ++s) {
      float* at = row + i + s * kLanes;
      const auto weight = exp2_of_negative(d, hn::Sub(hn::LoadU(d, at), hn::Set(d, highest)));
      hn::StoreU(weight, d, at);
      sums[s] = hn::Add(sums[s], weight);
    }
  }
  float partial[16];
  for (int s = 0; s < kSums; ++s) hn::StoreU(sums[s], d, partial + s * kLanes);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  }
  return partial[0];
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
