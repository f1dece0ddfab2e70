// The streaming state of a sequence's attention history (HistoryState::stream) on the GPU. Of each
// map:
//
//   header      MapHeader, padded to 64 bytes
//   sums        [columns] int32: s of the window's interior rows 2 .. 61, summed, in 2^-22
//   scores      [columns] int32: sums, and s of this step's rows 0, 1, 62, 63
//
// and after the last map's, for each map, [2, columns / 4] HotEntry: room for lists of segments
// (hot_list.cuh).
//
// A score stands for conv3_bias + score * 2^-22 / 64. Bytes of zero are "nothing summed".
// Columns are candidates, rounded up to whole spans.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/device.h"
#include "kernels/predict_limits.h"

namespace foretoken::kernels::cuda {

inline constexpr int kSinkColumns = kSinkTokens / kBlockTokens;
inline constexpr int kLocalColumns = kLocalTokens / kBlockTokens;
inline constexpr int kSegmentWidth = 4;   // columns that are cold or hot together
inline constexpr int kSpanSegments = 16;  // what a warp evaluates at once
inline constexpr int kSpanColumns = kSpanSegments * kSegmentWidth;
inline constexpr int kFixedPointBits = 22;

inline constexpr int kMostRowsBack = kHistoryRows + 1;  // that a kernel looks

// A listed segment (hot_list.cuh).
struct alignas(8) HotEntry {
  std::uint32_t of;
  std::uint32_t step;
};

struct MapHeader {
  std::int64_t num_rows;    // rows appended when the sums were made; 0: there are none
  std::int64_t clean_from;  // windows that end before this row hold a value that is none
  std::int32_t columns;     // candidates of the sums
  std::uint32_t bound;      // on scores, of the next choice's list (best_blocks.cu); 0: not known
  std::uint32_t gap;        // from there to the last choice's threshold
};
inline constexpr std::size_t kMapHeaderBytes = 64;
static_assert(sizeof(MapHeader) <= kMapHeaderBytes);

// Candidate columns of a row of n columns: all but sink and the last local window.
constexpr int num_candidates(int columns) {
  const int candidates = columns - kSinkColumns - kLocalColumns;
  return candidates > 0 ? candidates : 0;
}
constexpr int num_spans(int candidates) { return (candidates + kSpanColumns - 1) / kSpanColumns; }
constexpr int padded_candidates(int max_columns) {
  return num_spans(num_candidates(max_columns)) * kSpanColumns;
}

constexpr std::size_t sums_offset() { return kMapHeaderBytes; }
constexpr std::size_t scores_offset(int max_columns) {
  return sums_offset() +
         sizeof(std::int32_t) * static_cast<std::size_t>(padded_candidates(max_columns));
}
// Of a map, without its lists' room.
constexpr std::size_t map_bytes(int max_columns) {
  return scores_offset(max_columns) +
         sizeof(std::int32_t) * static_cast<std::size_t>(padded_candidates(max_columns));
}
// Entries of a list for which a map gives room.
constexpr int list_room(int max_columns) { return padded_candidates(max_columns) / kSegmentWidth; }
// Of a map in all.
constexpr std::size_t map_state_bytes(int max_columns) {
  return map_bytes(max_columns) +
         2 * sizeof(HotEntry) * static_cast<std::size_t>(list_room(max_columns));
}

}  // namespace foretoken::kernels::cuda
