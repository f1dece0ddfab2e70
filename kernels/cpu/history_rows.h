// Where rows of an attention history lie, and how a value is stored (HistoryType).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/device.h"

namespace foretoken::kernels {

inline int num_maps(const HistoryState& state) {
  return state.num_kv_heads * state.maps_per_kv_head;
}

// Row r of a map. REQUIRES: 0 <= r, and r is one of the last kRingRows rows appended.
inline std::byte* history_row(const HistoryState& state, int layer, int map, std::int64_t r) {
  const std::size_t ring = static_cast<std::size_t>(layer * num_maps(state) + map) * kRingRows +
                           static_cast<std::size_t>(r % kRingRows);
  return state.rows + ring * static_cast<std::size_t>(state.pitch) *
                          bytes_of(static_cast<HistoryType>(state.type));
}

// out[i] = row[first + i] for i < count. Non-finite values come back non-finite.
void decode_history(HistoryType type, const std::byte* row, int first, int count, float* out);
// row[i] = values[i] for i < count, rounded to nearest.
void encode_history(HistoryType type, const float* values, int count, std::byte* row);

}  // namespace foretoken::kernels
