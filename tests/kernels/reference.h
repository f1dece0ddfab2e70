// The transformer ops as their formulas read: slow, double precision, one thread.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "kernels/kv_layout.h"

namespace foretoken::kernels::reference {

// ---- number formats ----

inline double from_fp16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  double value = std::ldexp(mantissa + (exponent == 0 ? 0 : 1024), std::max(exponent, 1) - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return (bits >> 15) != 0 ? -value : value;
}
inline double from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Nearest value of the format, ties to even: by search among the neighbours of a guess.
template <typename Decode>
std::uint16_t nearest(double value, Decode decode) {
  std::uint32_t low = 0;  // magnitudes rise with their bits
  std::uint32_t high = 0x7FFF;
  const double magnitude = std::abs(value);
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (decode(static_cast<std::uint16_t>(middle)) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - decode(static_cast<std::uint16_t>(low));
  const double above = decode(static_cast<std::uint16_t>(low + 1)) - magnitude;
  const std::uint32_t best = below < above || (below == above && low % 2 == 0) ? low : low + 1;
  return static_cast<std::uint16_t>(best | (std::signbit(value) ? 0x8000U : 0U));
}

// A vector of one of the three types, as bytes; and back.
inline std::vector<std::byte> encode(std::span<const float> values, DataType type) {
  std::vector<std::byte> bytes(values.size() * bytes_of(type));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (type == DataType::kFp32) {
      std::memcpy(bytes.data() + 4 * i, &values[i], 4);
    } else {
      const std::uint16_t bits =
          type == DataType::kFp16 ? nearest(values[i], from_fp16) : nearest(values[i], from_bf16);
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
    }
  }
  return bytes;
}
inline double decode_at(const void* data, DataType type, std::size_t i) {
  const auto* bytes = static_cast<const std::byte*>(data);
  if (type == DataType::kFp32) {
    float value = 0;
    std::memcpy(&value, bytes + 4 * i, 4);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, bytes + 2 * i, 2);
  return type == DataType::kFp16 ? from_fp16(bits) : from_bf16(bits);
}

// ---- elementwise ----

inline std::vector<double> rms_norm(std::span<const double> x, std::span<const float> weight,
                                    double eps) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  const double inverse = 1 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = x[i] * inverse * weight[i];
  return out;
}

inline double swiglu(double gate, double up) { return gate / (1 + std::exp(-gate)) * up; }

// Rotate-half, as Hugging Face's apply_rotary_pos_emb.
inline std::vector<double> rotate(std::span<const double> x, std::span<const float> inv_freq,
                                  double scale, int position) {
  const std::size_t half = x.size() / 2;
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < half; ++i) {
    // The angle is rounded to float, as the models were trained with.
    const double angle = static_cast<float>(position) * inv_freq[i];
    const double c = std::cos(angle) * scale;
    const double s = std::sin(angle) * scale;
    out[i] = x[i] * c - x[half + i] * s;
    out[half + i] = x[half + i] * c + x[i] * s;
  }
  return out;
}

// ---- attention of one query over some keys ----

struct Attention {
  std::vector<double> out;
  double lse = -std::numeric_limits<double>::infinity();
  std::vector<double> logits;
};

// keys(i, d) and values(i, d) for i < count.
template <typename Keys, typename Values>
Attention attend(std::span<const float> q, int count, double scale, Keys keys, Values values) {
  Attention result;
  double highest = -std::numeric_limits<double>::infinity();
  for (int i = 0; i < count; ++i) {
    double dot = 0;
    for (std::size_t d = 0; d < q.size(); ++d) dot += q[d] * keys(i, static_cast<int>(d));
    result.logits.push_back(scale * dot);
    highest = std::max(highest, scale * dot);
  }
  double sum = 0;
  result.out.assign(q.size(), 0);
  for (int i = 0; i < count; ++i) {
    const double weight = std::exp(result.logits[static_cast<std::size_t>(i)] - highest);
    sum += weight;
    for (std::size_t d = 0; d < q.size(); ++d)
      result.out[d] += weight * values(i, static_cast<int>(d));
  }
  if (count == 0) return result;
  for (double& value : result.out) value /= sum;
  result.lse = highest + std::log(sum);
  return result;
}

}  // namespace foretoken::kernels::reference
