// Two neighbouring history values as the CNN takes them, in one register: fp16, scaled by 2^12; or
// for the cold stencils, of a bf16 history, as they lie (ColdOperand).
//
// Block maxima of a softmax lie in [0, 1]; rounding may pass 1 by a little. What does not lie in
// [0, 2], or is no number, becomes any finite number, the same each time; as a cold operand its
// bits lie above kGreatest. (Finite, since taps of 0 must leave it out.)
#pragma once

#include <cstdint>

#include "kernels/cuda/cnn_tables.h"
#include "kernels/cuda/history_value.cuh"

namespace foretoken::kernels::cuda {

__device__ inline std::uint32_t finite(std::uint32_t pair) {
  return __vminu2(pair, 0x7BFF7BFF);  // what is negative or no number is above
}

// Raw: a pair as a register holds it before its turn. read() wants an even column; first() leaves
// the pair's first value.
template <typename T>
struct HistoryPair;

template <>
struct HistoryPair<float> {
  using Raw = std::uint32_t;  // as the network takes it: no more registers than other types need
  static constexpr ColdOperand kCold = kScaledHalf;
  static constexpr std::uint32_t kGreatest = 0x7000;  // 2, scaled

  __device__ static Raw read(const float* at) {
    const float2 value = *reinterpret_cast<const float2*>(at);
    const __half2 pair = __floats2half2_rn(value.x * kValueScale, value.y * kValueScale);
    return finite(reinterpret_cast<const std::uint32_t&>(pair));
  }
  __device__ static Raw first(Raw raw) { return raw & 0xFFFFU; }
  __device__ static std::uint32_t cold(Raw raw) { return raw; }
  __device__ static std::uint32_t scaled(Raw raw) { return raw; }
};

template <>
struct HistoryPair<__nv_bfloat16> {
  using Raw = std::uint32_t;
  static constexpr ColdOperand kCold = kPlainBf16;
  static constexpr std::uint32_t kGreatest = 0x4000;

  __device__ static Raw read(const __nv_bfloat16* at) {
    return *reinterpret_cast<const std::uint32_t*>(at);
  }
  __device__ static Raw first(Raw raw) { return raw & 0xFFFFU; }
  __device__ static std::uint32_t cold(Raw raw) { return raw; }
  __device__ static std::uint32_t scaled(Raw raw) {
    // Both at once, as 16-bit integers: from the exponents 127 (bf16's bias) - 15 (fp16's) - 12,
    // then three more bits for mantissas. What is negative becomes 0; what is no number, or too
    // great, the greatest number with such a mantissa. Below 2^-14 (scaled), where fp16 has no
    // exponents, values lose no more than 2^-15.
    static_assert(kValueScale == 1 << 12);
    constexpr std::uint32_t kMinusBias = 0x10000 - ((127 - 15 - 12) << 7);
    constexpr std::uint32_t kMost = 0x7BFF >> 3;
    return __viaddmin_s16x2_relu(raw, kMinusBias << 16 | kMinusBias, kMost << 16 | kMost) << 3;
  }
};

template <>
struct HistoryPair<E5m3> {
  using Raw = std::uint16_t;
  static constexpr ColdOperand kCold = kScaledHalf;
  static constexpr std::uint32_t kGreatest = 0x7000;

  __device__ static Raw read(const E5m3* at) { return *reinterpret_cast<const Raw*>(at); }
  __device__ static Raw first(Raw raw) { return static_cast<Raw>(raw & 0xFFU); }
  __device__ static std::uint32_t cold(Raw raw) {
    return __byte_perm(raw, 0, 0x1404) >> 1;  // a code is the upper byte of an fp16 twice as great
  }
  __device__ static std::uint32_t scaled(Raw raw) { return finite(cold(raw)); }
};

// The rows of a map. Candidates outside [0, columns), and rows before the first, are 0.
template <typename T>
struct PairRows {
  using Pair = HistoryPair<T>;
  using Raw = typename Pair::Raw;
  const T* ring;  // candidates of the ring's row 0
  int pitch;
  int columns;

  // nullptr before the first row.
  __device__ const T* row(std::int64_t r) const {
    const auto place = static_cast<std::uint32_t>(r) % kRingRows;
    return r < 0 ? nullptr : ring + static_cast<std::ptrdiff_t>(place) * pitch;
  }
  __device__ Raw load(const T* row, int column) const {
    if (row == nullptr || column < 0 || column >= columns) return {};
    const Raw raw = Pair::read(row + column);
    return column + 1 == columns ? Pair::first(raw) : raw;  // its neighbour is no candidate
  }
};

}  // namespace foretoken::kernels::cuda
