// The segments that are not cold, as the slide kernel finds them and the hot kernel evaluates them:
// lists by side, sequence, and shard of its maps. Several shards, so that warps that append at once
// don't wait for one counter. A list's room is what its shard's maps give (map_layout.h): enough
// for every segment to be hot.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/cuda/cnn_tables.h"
#include "kernels/cuda/map_state.cuh"

namespace foretoken::kernels::cuda {

// HotEntry::of: a map of the sequence (all layers' maps), a segment of it, and whether its sums
// slide.
__device__ inline std::uint32_t pack_of(int map, int segment, bool slides) {
  return static_cast<std::uint32_t>(map) << 16 | (slides ? 0x8000U : 0U) |
         static_cast<std::uint32_t>(segment);
}
__device__ inline int map_of(std::uint32_t of) { return static_cast<int>(of >> 16); }
__device__ inline bool slides(std::uint32_t of) { return (of & 0x8000U) != 0; }
__device__ inline int segment_of(std::uint32_t of) { return static_cast<int>(of & 0x7FFFU); }
static_assert(kMaxPredictColumns / kSegmentWidth <= 0x8000);

// HotEntry::step, which all segments of the map share, so that what looks at one need not look at
// the map. place: in the ring, of the row that will be appended next; rows: appended so far, but no
// more than a kernel looks back; columns: candidates.
__device__ inline std::uint32_t pack_step(int place, int rows, int columns) {
  return static_cast<std::uint32_t>(columns) << 16 | static_cast<std::uint32_t>(place) << 8 |
         static_cast<std::uint32_t>(rows);
}
__device__ inline int columns_of(const HotEntry& entry) {
  return static_cast<int>(entry.step >> 16);
}
__device__ inline int place_of(const HotEntry& entry) {
  return static_cast<int>(entry.step >> 8 & 0xFFU);
}
__device__ inline int rows_of(const HotEntry& entry) {
  return static_cast<int>(entry.step & 0xFFU);
}
static_assert(num_candidates(kMaxPredictColumns) < 1 << 16 && kRingRows < 1 << 8 &&
              kMostRowsBack < 1 << 8);

struct HotLists {
  std::uint32_t* counters;  // [sides, sequences, shards], then starts_anew()
  int sequences;
  int shard_bits;  // a sequence has 1 << shard_bits

  // Of all sequences together 64 a side, if sequences are no more.
  static HotLists of(int num_sequences, std::uint32_t* counters) {
    const auto each = static_cast<unsigned>(std::max(1, 64 / num_sequences));
    return {counters, num_sequences, static_cast<int>(std::bit_width(each)) - 1};
  }
  __host__ __device__ int of_side() const { return sequences << shard_bits; }
  __host__ __device__ int num_lists() const { return kNumSides * of_side(); }
  __host__ __device__ int num_counters() const { return num_lists() + 1; }
  // Not zero: some map has sums that start anew (predict.cu).
  __device__ std::uint32_t& starts_anew() const { return counters[num_lists()]; }
  __device__ int shards() const { return 1 << shard_bits; }
  // Map m of a sequence belongs to shard m % shards().
  __device__ int list(int sequence, int map, int side) const {
    return side * of_side() + (sequence << shard_bits) + (map & (shards() - 1));
  }
  __device__ int side_of(int list) const { return list < of_side() ? 0 : 1; }
  __device__ int sequence_of(int list) const {
    return (list - side_of(list) * of_side()) >> shard_bits;
  }

  // The entries of a list, one after the other.
  __device__ HotEntry* entries(const HistoryState& state, int list) const {
    const int shard = (list - side_of(list) * of_side()) & (shards() - 1);
    const int maps = state.num_layers * num_maps(state);
    const int each = maps >> shard_bits;
    const int rest = maps & (shards() - 1);  // so many of the first shards have one more
    const int before = shard * each + min(shard, rest);
    const int of_shard = each + (shard < rest ? 1 : 0);
    const std::int64_t room = list_room(state.max_columns);
    auto* all = reinterpret_cast<HotEntry*>(Map{state, maps}.bytes());
    return all + (before * kNumSides + of_shard * side_of(list)) * room;
  }
};

}  // namespace foretoken::kernels::cuda
