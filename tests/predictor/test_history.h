// A HistoryState of one layer in host memory, filled by hand, for tests of the streaming
// evaluation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/history_rows.h"
#include "kernels/cpu/map_stream.h"
#include "kernels/device.h"

namespace foretoken::predictor {

class TestHistory {
 public:
  TestHistory(int num_maps, int max_columns, kernels::HistoryType type)
      : pitch_((max_columns + 7) / 8 * 8),
        rows_(static_cast<std::size_t>(num_maps * kernels::kRingRows * pitch_) *
              kernels::bytes_of(type)),
        stream_(static_cast<std::size_t>(num_maps) * kernels::map_stream_bytes(max_columns)) {
    state_.rows = rows_.data();
    state_.stream = stream_.data();
    state_.num_rows = &num_rows_;
    state_.num_columns = &num_columns_;
    state_.fallbacks = &fallbacks_;
    state_.num_layers = 1;
    state_.num_kv_heads = num_maps;
    state_.maps_per_kv_head = 1;
    state_.max_columns = max_columns;
    state_.pitch = pitch_;
    state_.type = static_cast<std::int32_t>(type);
  }
  TestHistory(const TestHistory&) = delete;
  TestHistory& operator=(const TestHistory&) = delete;

  const kernels::HistoryState& state() const { return state_; }
  std::int64_t num_rows() const { return num_rows_; }

  // Appends a row of every map: rows [num_maps, row_stride], `columns` of each used.
  void append(std::span<const float> rows, std::size_t row_stride, int columns) {
    for (int map = 0; map < state_.num_kv_heads; ++map) {
      std::vector<float> row(static_cast<std::size_t>(pitch_), 0.0F);
      const float* from = rows.data() + static_cast<std::size_t>(map) * row_stride;
      std::copy(from, from + columns, row.begin());
      kernels::encode_history(static_cast<kernels::HistoryType>(state_.type), row.data(), pitch_,
                              kernels::history_row(state_, 0, map, num_rows_));
    }
    ++num_rows_;
    num_columns_ = columns;
  }

  void forget_sums() { std::fill(stream_.begin(), stream_.end(), std::byte{0}); }

  // The map's interior sums, as they lie in its streaming state.
  std::vector<std::int32_t> sums(int map) const {
    const std::byte* from =
        stream_.data() +
        static_cast<std::size_t>(map) * kernels::map_stream_bytes(state_.max_columns) +
        kernels::kMapStreamHeaderBytes;
    const auto* first = reinterpret_cast<const std::int32_t*>(from);
    return {first, first + kernels::num_candidates(num_columns_)};
  }

 private:
  int pitch_;
  std::vector<std::byte> rows_;
  std::vector<std::byte> stream_;
  std::int64_t num_rows_ = 0;
  std::int32_t num_columns_ = 0;
  std::uint32_t fallbacks_ = 0;
  kernels::HistoryState state_{};
};

}  // namespace foretoken::predictor
