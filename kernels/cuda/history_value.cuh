// How a history value is stored (HistoryType, docs/predictor.md), and where rows lie: the device
// side of kernels/cpu/history_rows.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/types.cuh"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// One byte: 5 exponent bits with fp16's bias, 3 mantissa bits, of value * 2^12.
struct E5m3 {
  std::uint8_t code;
};

inline constexpr float kE5m3Scale = 4096.0F;

__device__ inline float to_float(E5m3 value) {
  const auto bits = static_cast<std::uint16_t>(value.code << 7);
  return __half2float(__ushort_as_half(bits)) * (1.0F / kE5m3Scale);
}

// Rounds half up, straight from fp32. What is no number or too great stays so.
template <>
__device__ inline E5m3 from_float<E5m3>(float value) {
  const float scaled = value * kE5m3Scale;
  if (isnan(scaled)) return {0xFC};
  if (!(scaled > 0)) return {0};
  if (scaled >= 63488.0F) return {0xF8};  // rounds past 61440, the greatest finite code
  if (scaled < 0x1p-14F) return {static_cast<std::uint8_t>(floorf(scaled * 0x1p17F + 0.5F))};
  constexpr int kDropped = 23 - 3;
  const std::uint32_t bits = __float_as_uint(scaled) + (1U << (kDropped - 1));
  return {static_cast<std::uint8_t>((bits >> kDropped) - ((127U - 15U) << 3))};
}

// Eight values of one row, loaded and stored at once.
template <typename T>
struct alignas(sizeof(T) * 8 < 16 ? sizeof(T) * 8 : 16) Eight {
  T v[8];
};

__device__ inline int num_maps(const HistoryState& state) {
  return state.num_kv_heads * state.maps_per_kv_head;
}

// Row r of a map, as Device::history_append numbers them.
template <typename T>
__device__ T* history_row(const HistoryState& state, int layer, int map, std::int64_t r) {
  const auto ring = (static_cast<std::int64_t>(layer) * num_maps(state) + map) * kRingRows;
  return reinterpret_cast<T*>(state.rows) + (ring + r % kRingRows) * state.pitch;
}

// Calls f(TypeTag<T>) for the type that a HistoryState::type names.
template <typename F>
__device__ void with_history_type(std::int32_t type, F&& f) {
  switch (static_cast<HistoryType>(type)) {
    case HistoryType::kFp32:
      f(TypeTag<float>{});
      return;
    case HistoryType::kBf16:
      f(TypeTag<__nv_bfloat16>{});
      return;
    case HistoryType::kE5m3:
      f(TypeTag<E5m3>{});
      return;
  }
}

}  // namespace foretoken::kernels::cuda
