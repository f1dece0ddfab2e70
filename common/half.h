// IEEE half precision (fp16) by its bits, for single values: compilers disagree on _Float16. Whole
// tensors are converted by kernels.
// Example: tests/common/half_test.cc
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace foretoken {

// Exact; a NaN stays one.
inline float float_from_half(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000U} << 16;
  const std::uint32_t magnitude = std::uint32_t{half & 0x7FFFU} << 13;
  if (magnitude >= 0x0F800000U) {  // infinity or NaN
    return std::bit_cast<float>(sign | magnitude | 0x7F800000U);
  }
  // The product moves the exponent's bias from 15 to 127, of subnormals too.
  const float rebiased = std::bit_cast<float>(magnitude) * 0x1p112F;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(rebiased));
}

// Rounds to nearest, ties to even; what is too large becomes infinity, a NaN stays one.
inline std::uint16_t half_from_float(float value) {
  const auto sign = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16 & 0x8000U);
  const float magnitude = std::fabs(value);
  std::uint32_t half = 0;
  if (std::isnan(value)) {
    half = 0x7E00;
  } else if (magnitude >= 65520.0F) {  // halfway past the largest half
    half = 0x7C00;
  } else if (magnitude < 0x1p-14F) {  // subnormal: adding 0.5 rounds to its unit, 2^-24
    half = std::bit_cast<std::uint32_t>(magnitude + 0.5F) - std::bit_cast<std::uint32_t>(0.5F);
  } else {
    const auto bits = std::bit_cast<std::uint32_t>(magnitude);
    half = ((bits + 0x0FFFU + (bits >> 13 & 1U)) >> 13) - (112U << 10);
  }
  return static_cast<std::uint16_t>(sign | half);
}

}  // namespace foretoken
