// A map of the attention history with its streaming state, as the predictor's kernels see it, and
// how they number the work of a batch.
#pragma once

#include <cstdint>

#include "kernels/cuda/history_value.cuh"
#include "kernels/cuda/map_layout.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

inline constexpr int kMaxMaps = 128;  // of a KV head

// A map of one sequence, by its index among all layers' maps.
struct Map {
  const HistoryState& state;
  int index;  // layer * num_maps + map

  __device__ int layer() const { return index / num_maps(state); }
  __device__ int candidates() const { return num_candidates(state.num_columns[layer()]); }
  __device__ std::int64_t num_rows() const { return state.num_rows[layer()]; }

  __device__ std::byte* bytes() const {
    return state.stream + static_cast<std::size_t>(index) * map_bytes(state.max_columns);
  }
  __device__ MapHeader& header() const { return *reinterpret_cast<MapHeader*>(bytes()); }
  // Whether the window holds values alone, so that scores mean something.
  __device__ bool is_clean() const { return num_rows() >= header().clean_from; }
  __device__ std::int32_t* sums() const {
    return reinterpret_cast<std::int32_t*>(bytes() + sums_offset());
  }
  __device__ std::int32_t* scores() const {
    return reinterpret_cast<std::int32_t*>(bytes() + scores_offset(state.max_columns));
  }
};

// With as many candidates as are chosen no score is needed, and sums are not kept.
__device__ inline bool is_scored(const HistoryState& state, int layer) {
  return num_candidates(state.num_columns[layer]) > state.top_k;
}

// Where a layer's sums stand. Its maps move together: all are marked as current, or none is.
struct Progress {
  bool slides;        // by one row; else sums of kept columns stay as they are
  int first_rebuilt;  // columns from here on are summed anew
};
__device__ inline Progress progress_of(const MapHeader& header, std::int64_t num_rows,
                                       int candidates) {
  const bool known = header.num_rows > 0 && header.columns <= candidates;
  const bool slides = known && header.num_rows + 1 == num_rows;
  if (!slides && !(known && header.num_rows == num_rows)) return {false, 0};
  if (header.columns == candidates) return {slides, candidates};
  // A new column changes the two before it in all rows: the edge that pads with zeros moves.
  return {slides, max(0, header.columns - 2) / kSegmentWidth * kSegmentWidth};
}

// counts[i] becomes the sum of those before it, counts[num] that of all. By all threads of the CTA,
// which have written the counts.
__device__ inline void sum_up(int num, int* counts) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < num; first += 32) {
      const int count = first + lane < num ? counts[first + lane] : 0;
      const int through = warp_inclusive_sum(count);
      if (first + lane < num) counts[first + lane] = before + through - count;
      before += __shfl_sync(~0U, through, 31);
    }
    if (lane == 0) counts[num] = before;
  }
  __syncthreads();
}

// Numbers the items of all sequences, one sequence after the other: first[i] is the first item of
// sequence i, first[num_sequences] how many there are. A sequence has num_maps times the greatest
// of units_of(state, layer) items. To be called by all threads of the CTA.
template <typename UnitsOf>
__device__ void number_items(const HistoryState* states, int num_sequences, const UnitsOf& units_of,
                             int* first) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < num_sequences; i += warps) {
    int units = 0;
#pragma unroll 1
    for (int layer = lane; layer < states[i].num_layers; layer += 32) {
      units = max(units, units_of(states[i], layer));
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      units = max(units, __shfl_xor_sync(~0U, units, offset));
    }
    first[i] = units * states[i].num_layers * num_maps(states[i]);
  }
  sum_up(num_sequences, first);
}

// An item: one of a map's units.
struct Item {
  int sequence;
  int map;  // among all layers' maps
  int unit;
  int units;  // of each of the sequence's maps
};
// *sequence is where the search starts: items are asked for in rising order.
__device__ inline Item find_item(const HistoryState* states, const int* first, int item,
                                 int* sequence) {
  while (first[*sequence + 1] <= item) ++*sequence;
  const HistoryState& state = states[*sequence];
  const int units =
      (first[*sequence + 1] - first[*sequence]) / (state.num_layers * num_maps(state));
  const int i = item - first[*sequence];
  return {*sequence, i / units, i % units, units};
}

}  // namespace foretoken::kernels::cuda
