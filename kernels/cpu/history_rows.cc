#include "kernels/cpu/history_rows.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace foretoken::kernels {
namespace {

constexpr float kE5m3Scale = 4096.0F;  // the fp16 bits hold value * 2^12: 2^-29 .. 1 is in range

float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Round to nearest even; a NaN stays one.
std::uint16_t bf16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

// Five exponent bits with fp16's bias of 15, three mantissa bits, subnormals as in fp16.
float e5m3_to_float(std::uint8_t code) {
  const int exponent = code >> 3;
  const int mantissa = code & 7;
  if (exponent == 31) {
    return mantissa == 0 ? std::numeric_limits<float>::infinity()
                         : std::numeric_limits<float>::quiet_NaN();
  }
  const float scaled = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -14 - 3)
                                     : std::ldexp(static_cast<float>(8 + mantissa), exponent - 18);
  return scaled / kE5m3Scale;
}

// Round half up on the magnitude, straight from fp32: one rounding, no fp16 between.
std::uint8_t e5m3_from_float(float value) {
  constexpr std::uint8_t kNan = 0xFC;
  constexpr std::uint8_t kInfinity = 0xF8;
  if (std::isnan(value)) return kNan;
  const float scaled = value * kE5m3Scale;
  if (!(scaled > 0)) return 0;
  if (scaled >= 63488.0F) return kInfinity;            // rounds past 61440, the largest finite code
  constexpr float kSmallestNormal = 6.103515625e-05F;  // 2^-14
  if (scaled < kSmallestNormal) {
    return static_cast<std::uint8_t>(std::floor(std::ldexp(scaled, 14 + 3) + 0.5F));
  }
  constexpr int kDropped = 23 - 3;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(scaled) + (1U << (kDropped - 1));
  return static_cast<std::uint8_t>((bits >> kDropped) - ((127U - 15U) << 3));
}

const std::array<float, 256>& e5m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> out{};
    for (int code = 0; code < 256; ++code) {
      out[static_cast<std::size_t>(code)] = e5m3_to_float(static_cast<std::uint8_t>(code));
    }
    return out;
  }();
  return table;
}

}  // namespace

void decode_history(HistoryType type, const std::byte* row, int first, int count, float* out) {
  switch (type) {
    case HistoryType::kFp32:
      std::memcpy(out, row + static_cast<std::size_t>(first) * sizeof(float),
                  static_cast<std::size_t>(count) * sizeof(float));
      return;
    case HistoryType::kBf16: {
      const auto* bits = reinterpret_cast<const std::uint16_t*>(row) + first;
      for (int i = 0; i < count; ++i) out[i] = bf16_to_float(bits[i]);
      return;
    }
    case HistoryType::kE5m3: {
      const auto& table = e5m3_table();
      const auto* codes = reinterpret_cast<const std::uint8_t*>(row) + first;
      for (int i = 0; i < count; ++i) out[i] = table[codes[i]];
      return;
    }
  }
}

void encode_history(HistoryType type, const float* values, int count, std::byte* row) {
  switch (type) {
    case HistoryType::kFp32:
      std::memcpy(row, values, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case HistoryType::kBf16: {
      auto* bits = reinterpret_cast<std::uint16_t*>(row);
      for (int i = 0; i < count; ++i) bits[i] = bf16_from_float(values[i]);
      return;
    }
    case HistoryType::kE5m3: {
      auto* codes = reinterpret_cast<std::uint8_t*>(row);
      for (int i = 0; i < count; ++i) codes[i] = e5m3_from_float(values[i]);
      return;
    }
  }
}

}  // namespace foretoken::kernels
