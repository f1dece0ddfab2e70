// The streaming state of one map of the attention history (HistoryState::stream), as the kernels of
// the predictor share it, and how they number the maps of a batch.
//
//   header      MapHeader, padded to 64 bytes
//   sums        [columns] int32: s of the window's interior rows 2 .. 61, summed, in 2^-22
//   boundary    [columns] int32: s of rows 0, 1, 62, 63 of this step
//   hot         [2, segments] uint32: this step's segments that are not cold (hot_list.cuh)
// Bytes of zero are "nothing summed". Columns are candidates, rounded up to whole spans.
#pragma once

#include <cstdint>

#include "kernels/cuda/history_value.cuh"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

inline constexpr int kSinkColumns = kSinkTokens / kBlockTokens;
inline constexpr int kLocalColumns = kLocalTokens / kBlockTokens;
inline constexpr int kSpanColumns = 64;             // what a warp evaluates at once
inline constexpr int kMaxPredictColumns = 1 << 16;  // a million tokens

struct MapHeader {
  std::int64_t num_rows;    // rows appended when the sums were made; 0: there are none
  std::int64_t clean_from;  // windows that end before this row hold a value that is none
  std::int32_t columns;     // candidates of the sums
};
inline constexpr std::size_t kMapHeaderBytes = 64;
static_assert(sizeof(MapHeader) <= kMapHeaderBytes);

// Candidate columns of a row of n columns: all but sink and the last local window.
__host__ __device__ constexpr int num_candidates(int columns) {
  const int candidates = columns - kSinkColumns - kLocalColumns;
  return candidates > 0 ? candidates : 0;
}
__host__ __device__ constexpr int padded_candidates(int max_columns) {
  return (num_candidates(max_columns) + kSpanColumns - 1) / kSpanColumns * kSpanColumns;
}
// sums and boundary: 4 bytes a column each; hot: 2 lists of 4 bytes a segment of 4 columns.
__host__ __device__ constexpr std::size_t map_state_bytes(int max_columns) {
  return kMapHeaderBytes + static_cast<std::size_t>(padded_candidates(max_columns)) * (4 + 4 + 2);
}

// A map of one sequence, by its index among all layers' maps.
struct Map {
  const HistoryState& state;
  int index;  // layer * num_maps + map

  __device__ int layer() const { return index / num_maps(state); }
  __device__ int candidates() const { return num_candidates(state.num_columns[layer()]); }
  __device__ std::int64_t num_rows() const { return state.num_rows[layer()]; }
  // With as many candidates as are chosen no score is needed, and sums are not kept.
  __device__ bool is_scored() const { return candidates() > state.top_k; }

  __device__ std::byte* bytes() const {
    return state.stream + static_cast<std::size_t>(index) * map_state_bytes(state.max_columns);
  }
  __device__ MapHeader& header() const { return *reinterpret_cast<MapHeader*>(bytes()); }
  __device__ std::int32_t* sums() const {
    return reinterpret_cast<std::int32_t*>(bytes() + kMapHeaderBytes);
  }
  __device__ std::int32_t* boundary() const {
    return sums() + padded_candidates(state.max_columns);
  }
  // The candidates' part of row r.
  template <typename T>
  __device__ const T* row(std::int64_t r) const {
    return history_row<T>(state, 0, index, r) + kSinkColumns;
  }
};

// Numbers the items of all sequences, one sequence after the other: first[i] is the first item of
// sequence i, first[num_sequences] how many there are. count_of(i) is called by one thread.
// To be called by all threads of the CTA.
inline constexpr int kMaxSequences = 1024;
template <typename CountOf>
__device__ void number_items(int num_sequences, const CountOf& count_of, int* first) {
  for (int i = static_cast<int>(threadIdx.x); i < num_sequences;
       i += static_cast<int>(blockDim.x)) {
    first[i] = count_of(i);
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
