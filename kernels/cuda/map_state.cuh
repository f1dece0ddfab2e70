// A map of the attention history with its streaming state, as the predictor's kernels see it, and
// how they number the work of a batch.
#pragma once

#include <cstdint>

#include "kernels/cuda/history_value.cuh"
#include "kernels/cuda/map_layout.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// A map of one sequence, by its index among all layers' maps.
struct Map {
  const HistoryState& state;
  int index;  // layer * num_maps + map

  __device__ int layer() const { return index / num_maps(state); }
  __device__ int candidates() const { return num_candidates(state.num_columns[layer()]); }
  __device__ std::int64_t num_rows() const { return state.num_rows[layer()]; }

  __device__ std::byte* bytes() const {
    return state.stream + static_cast<std::size_t>(index) * map_state_bytes(state.max_columns);
  }
  __device__ MapHeader& header() const { return *reinterpret_cast<MapHeader*>(bytes()); }
  __device__ std::int32_t* sums() const {
    return reinterpret_cast<std::int32_t*>(bytes() + sums_offset());
  }
  __device__ std::int32_t* boundary() const {
    return reinterpret_cast<std::int32_t*>(bytes() + boundary_offset(state.max_columns));
  }
};

// With as many candidates as are chosen no score is needed, and sums are not kept.
__device__ inline bool is_scored(const HistoryState& state, int layer) {
  return num_candidates(state.num_columns[layer]) > state.top_k;
}

// Where a layer's sums stand. Its maps move together.
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

// Numbers the items of all sequences, one sequence after the other: first[i] is the first item of
// sequence i, first[num_sequences] how many there are. count_of(i) is called by all lanes of one
// warp, and the greatest of their answers counts. To be called by all threads of the CTA.
inline constexpr int kMaxSequences = 1024;
template <typename CountOf>
__device__ void number_items(int num_sequences, const CountOf& count_of, int* first) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < num_sequences; i += warps) {
    int count = count_of(i);
    for (int offset = 16; offset > 0; offset /= 2) {
      count = max(count, __shfl_xor_sync(~0U, count, offset));
    }
    first[i] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int i = 0; i < num_sequences; ++i) {
      const int count = first[i];
      first[i] = total;
      total += count;
    }
    first[num_sequences] = total;
  }
  __syncthreads();
}

}  // namespace foretoken::kernels::cuda
