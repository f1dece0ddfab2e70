// The segments that are not cold, as the slide kernel finds them and the hot kernel evaluates them:
// lists by sequence, shard of its maps, and side. Several shards, so that warps that append at once
// don't wait for one counter. A list's room is that of its shard's maps (map_layout.h), one after
// the other: enough for every segment to be hot.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/cnn_tables.h"
#include "kernels/cuda/map_state.cuh"

namespace foretoken::kernels::cuda {

// An entry: a map of the sequence (all layers' maps), a segment of it, and whether its sums slide.
__device__ inline std::uint32_t hot_entry(int map, int segment, bool slides) {
  return static_cast<std::uint32_t>(map) << 16 | (slides ? 0x8000U : 0U) |
         static_cast<std::uint32_t>(segment);
}
__device__ inline int map_of(std::uint32_t entry) { return static_cast<int>(entry >> 16); }
__device__ inline bool slides(std::uint32_t entry) { return (entry & 0x8000U) != 0; }
__device__ inline int segment_of(std::uint32_t entry) { return static_cast<int>(entry & 0x7FFFU); }
static_assert(kMaxPredictColumns / kSegmentWidth <= 0x8000);

struct HotLists {
  std::uint32_t* counters;  // [sequences, shards, sides]
  int shards;               // of a sequence

  // A shard for each of 64 maps at a time, over all sequences.
  static HotLists of(int num_sequences, std::uint32_t* counters) {
    return {counters, std::max(1, 64 / num_sequences)};
  }
  __host__ __device__ int num_lists(int num_sequences) const {
    return num_sequences * shards * kNumSides;
  }
  __device__ int list(int sequence, int map, int side) const {
    return (sequence * shards + map % shards) * kNumSides + side;
  }
  __device__ int sequence_of(int list) const { return list / (shards * kNumSides); }
  __device__ static int side_of(int list) { return list % kNumSides; }

  // Where entry i of a list lies.
  __device__ std::uint32_t* entry(const HistoryState& state, int list, int i) const {
    const int room = padded_candidates(state.max_columns) / kSegmentWidth;
    const int map = list / kNumSides % shards + i / room * shards;
    std::byte* lists = Map{state, map}.bytes() + hot_offset(state.max_columns);
    return reinterpret_cast<std::uint32_t*>(lists) + side_of(list) * room + i % room;
  }
};

}  // namespace foretoken::kernels::cuda
