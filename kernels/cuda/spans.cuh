// Spans of a map, as a warp of the predictor's kernels sees them: which lane has which columns.
#pragma once

#include <cstdint>

#include "kernels/cuda/cnn.cuh"
#include "kernels/cuda/history_pair.cuh"
#include "kernels/cuda/map_state.cuh"

namespace foretoken::kernels::cuda {

inline constexpr int kSeenRows = 5;  // of history, by a row of outputs
// The newest of them: the others were checked when they were that.
inline constexpr unsigned kNewest = 1U << (kSeenRows - 1);

__device__ inline int warp_of_grid() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
}
__device__ inline int warps_of_grid() { return static_cast<int>(gridDim.x * blockDim.x) / 32; }

template <typename T>
__device__ PairRows<T> rows_of(const Map& map) {
  return {history_row<T>(map.state, 0, map.index, 0) + kSinkColumns, map.state.pitch,
          map.candidates()};
}

// Rows first + i, of the bits i, hold values that are none: scores are not to be used until the
// last of them has left the window.
__device__ inline void distrust(const Map& map, std::int64_t first, unsigned rows) {
  if (rows == 0) return;
  const std::int64_t row = first + 31 - __clz(static_cast<int>(rows));
  atomicMax(reinterpret_cast<unsigned long long*>(&map.header().clean_from),
            static_cast<unsigned long long>(row + kHistoryRows + 1));
}

// Of segment g + 8 half of a span.
__device__ inline int first_column(int span, int half) {
  return span * kSpanColumns + (lane_id() / 4 + half * 8) * kSegmentWidth;
}
// Of segment g: the column that this lane reads of a row, and the first one that it writes of the
// cold stencils' products. Half a span later is what it has of segment g + 8.
__device__ inline int read_column(int span) {
  return first_column(span, 0) - 2 + lane_id() % 4 * 2;
}
__device__ inline int written_column(int span) { return first_column(span, 0) + lane_id() % 2 * 2; }

// Whether either of two cold operands stands for a value that is none.
template <typename T>
__device__ bool holds_none(std::uint32_t pair) {
  constexpr std::uint32_t kGreatest = HistoryPair<T>::kGreatest;
  return (pair & 0xFFFFU) > kGreatest || pair >> 16 > kGreatest;
}

// Of find_cold(), those that are not where the network pads.
__device__ inline unsigned leave_padded_out(unsigned cold, int span, int columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = first_column(span, half);
    if (first < columns && at_edge(first, columns)) cold &= ~(1U << half);
  }
  return cold;
}

}  // namespace foretoken::kernels::cuda
