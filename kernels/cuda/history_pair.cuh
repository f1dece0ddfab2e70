// Two neighbouring history values as the CNN takes them, in one register: scaled by 2^12, fp16; or
// as the cold stencils take them (ColdOperand).
#pragma once

#include <cstdint>

#include "kernels/cuda/cnn_tables.h"
#include "kernels/cuda/history_value.cuh"

namespace foretoken::kernels::cuda {

// As they lie in a row. REQUIRES of a load: an even column.
template <typename T>
struct RawPair;
template <>
struct RawPair<float> {
  using type = float2;
};
template <>
struct RawPair<__nv_bfloat16> {
  using type = std::uint32_t;
};
template <>
struct RawPair<E5m3> {
  using type = std::uint16_t;
};

__device__ inline std::uint32_t pack(float low, float high) {
  const __half2 pair = __floats2half2_rn(low * kValueScale, high * kValueScale);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

// Block maxima of a softmax lie in [0, 1]; rounding may pass 1 by a little. What does not lie in
// [0, 2], or is no number, becomes 0, and *wrong is set.
__device__ inline std::uint32_t pair_of(float2 raw, bool* wrong) {
  const bool low = raw.x >= 0 && raw.x <= 2;
  const bool high = raw.y >= 0 && raw.y <= 2;
  *wrong |= !low || !high;
  return pack(low ? raw.x : 0, high ? raw.y : 0);
}
__device__ inline std::uint32_t pair_of(std::uint32_t raw, bool* wrong) {
  const std::uint32_t bad = __vcmpgtu2(raw, 0x40004000U);  // above 2 in bf16; a sign is, too
  *wrong |= bad != 0;
  const std::uint32_t good = raw & ~bad;
  return pack(__uint_as_float(good << 16), __uint_as_float(good & 0xFFFF0000U));
}
__device__ inline std::uint32_t pair_of(std::uint16_t raw, bool* wrong) {
  const std::uint32_t bad = __vcmpgtu4(raw, 0xE0E0E0E0U);  // above 2 in e5m3
  *wrong |= bad != 0;
  const std::uint32_t good = raw & ~bad;
  return (good & 0xFFU) << 7 | (good & 0xFF00U) << 15;
}

// What lies outside [0, 2] has bits above kGreatest.
template <typename T>
struct ColdOperandOf {
  static constexpr ColdOperand kKind = kScaledHalf;
  static constexpr std::uint32_t kGreatest = 0x7000;  // 2, scaled
};
template <>
struct ColdOperandOf<__nv_bfloat16> {
  static constexpr ColdOperand kKind = kPlainBf16;
  static constexpr std::uint32_t kGreatest = 0x4000;
};
__device__ inline std::uint32_t cold_operand(float2 raw) { return pack(raw.x, raw.y); }
__device__ inline std::uint32_t cold_operand(std::uint32_t raw) { return raw; }
__device__ inline std::uint32_t cold_operand(std::uint16_t raw) {
  return __byte_perm(raw, 0, 0x1404) >> 1;  // a code is the upper byte of an fp16 twice as great
}

__device__ inline float2 first_of(float2 raw) { return {raw.x, 0}; }
__device__ inline std::uint32_t first_of(std::uint32_t raw) { return raw & 0xFFFFU; }
__device__ inline std::uint16_t first_of(std::uint16_t raw) {
  return static_cast<std::uint16_t>(raw & 0xFFU);
}

// The rows of a map. Candidates outside [0, columns), and rows before the first, are 0.
template <typename T>
struct PairRows {
  using Raw = typename RawPair<T>::type;
  const T* ring;  // candidates of the ring's row 0
  int pitch;
  int columns;

  // nullptr before the first row.
  __device__ const T* row(std::int64_t r) const {
    const auto place = static_cast<std::uint32_t>(r) % kRingRows;
    return r < 0 ? nullptr : ring + static_cast<std::ptrdiff_t>(place) * pitch;
  }
  __device__ Raw load(const T* row, int column) const {
    Raw raw{};
    if (row != nullptr && column >= 0 && column < columns) {
      raw = *reinterpret_cast<const Raw*>(row + column);
    }
    return raw;
  }
  // The last candidate may have a neighbour that is none.
  __device__ std::uint32_t convert(Raw raw, int column, bool* wrong) const {
    return pair_of(column + 1 == columns ? first_of(raw) : raw, wrong);
  }
  __device__ std::uint32_t operand(Raw raw, int column) const {
    return cold_operand(column + 1 == columns ? first_of(raw) : raw);
  }
};

}  // namespace foretoken::kernels::cuda
