#include "kernels/cpu/map_stream.h"

#include <algorithm>
#include <array>

#include "kernels/cpu/best_blocks.h"
#include "kernels/cpu/history_rows.h"

namespace foretoken::kernels {
namespace {

constexpr int kLocalBlocks = kLocalTokens / kBlockTokens;
constexpr int kHalo = 2;           // columns that a segment sees on each side
constexpr int kFirstInterior = 2;  // window rows 2 .. 61 see no edge of the window
constexpr int kLastInterior = kHistoryRows - 3;

// Block maxima of a softmax lie in [0, 1]; rounding may pass 1 by a little.
bool is_probability(float value) { return value >= 0.0F && value <= 2.0F; }

}  // namespace

int num_candidates(int columns) { return std::max(0, columns - kSinkBlocks - kLocalBlocks); }

std::size_t map_stream_bytes(int max_columns) {
  const auto sums = static_cast<std::size_t>(num_candidates(max_columns)) * sizeof(std::int32_t);
  return kMapStreamHeaderBytes + (sums + 63) / 64 * 64;
}

bool MapStream::update(const CnnFilters& filters, const HistoryState& state, int layer, int map) {
  filters_ = &filters;
  state_ = &state;
  layer_ = layer;
  map_ = map;
  num_rows_ = state.num_rows[layer];
  columns_ = num_candidates(state.num_columns[layer]);
  segments_ = (columns_ + kSegmentColumns - 1) / kSegmentColumns;
  stride_ = segments_ * kSegmentColumns + 2 * kHalo;
  std::byte* memory = state.stream + static_cast<std::size_t>(layer * num_maps(state) + map) *
                                         map_stream_bytes(state.max_columns);
  header_ = reinterpret_cast<MapStreamHeader*>(memory);
  sums_ = reinterpret_cast<std::int32_t*>(memory + kMapStreamHeaderBytes);
  rows_.assign(static_cast<std::size_t>(kHistoryRows * stride_), 0.0F);
  boundary_.resize(static_cast<std::size_t>(segments_ * kSegmentColumns));

  // A new column changes the two columns before it in all rows, since the edge that pads with
  // zeros moves: their segments are summed anew.
  const bool known = header_->num_rows > 0 && header_->columns <= columns_;
  const bool slide = known && header_->num_rows + 1 == num_rows_;
  int first_rebuilt = 0;
  if (slide || (known && header_->num_rows == num_rows_)) {
    first_rebuilt = header_->columns == columns_
                        ? segments_
                        : std::max(0, header_->columns - kHalo) / kSegmentColumns;
  }
  if (first_rebuilt < segments_) rebuild(first_rebuilt);
  step(slide, first_rebuilt);
  header_->num_rows = num_rows_;
  header_->columns = columns_;
  make_scores();
  return num_rows_ >= header_->clean_from;
}

// A row's candidates with zeros for what is no probability, so that sums stay exact; false if
// there was such a value. Rows before the first are zeros.
bool MapStream::load_row(std::int64_t r, float* out) const {
  std::fill_n(out, stride_, 0.0F);
  if (r < 0) return true;
  float* values = out + kHalo;
  decode_history(static_cast<HistoryType>(state_->type), history_row(*state_, layer_, map_, r),
                 kSinkBlocks, columns_, values);
  int wrong = 0;
  for (int c = 0; c < columns_; ++c) {
    const bool good = is_probability(values[c]);
    wrong += good ? 0 : 1;
    values[c] = good ? values[c] : 0.0F;
  }
  return wrong == 0;
}

void MapStream::fill_tile(std::span<const Item> items, CnnTile* tile) const {
  const int lanes = cnn_lanes();
  tile->at_edge = false;
  for (int lane = 0; lane < lanes; ++lane) {
    // Lanes without work repeat the first item; nobody reads them.
    const Item& item =
        items[static_cast<std::size_t>(lane) < items.size() ? static_cast<std::size_t>(lane)
                                                            : std::size_t{0}];
    const int first = item.segment * kSegmentColumns;
    for (int r = 0; r < kTileRows; ++r) {
      const float* row = item.rows + r * stride_ + first;
      for (int c = 0; c < kTileColumns; ++c) {
        tile->values[(r * kTileColumns + c) * lanes + lane] = row[c];
      }
    }
    for (int c = 0; c < kHiddenColumns; ++c) {
      const int column = first + c - 1;
      const bool inside = column >= 0 && column < columns_;
      tile->inside[c * lanes + lane] = inside ? 1.0F : 0.0F;
      tile->at_edge |= !inside;
    }
  }
}

// The rows that change with every step: 61 enters, 1 leaves, and the four at the window's edges.
// Sums slide in segments below first_rebuilt; the others are new already.
void MapStream::step(bool slide, int first_rebuilt) {
  const std::int64_t first_row = num_rows_ - kHistoryRows;
  float* bottom_rows = rows_.data();
  float* top_rows = bottom_rows + kTileRows * stride_;
  for (int r = 0; r < kTileRows; ++r) {
    const bool good = load_row(num_rows_ - kTileRows + r, bottom_rows + r * stride_);
    if (!good)
      header_->clean_from =
          std::max(header_->clean_from, num_rows_ - kTileRows + r + kHistoryRows + 1);
    load_row(first_row - 1 + r, top_rows + r * stride_);
  }
  const int lanes = cnn_lanes();
  CnnTile tile;
  CnnEdge bottom;
  CnnEdge top;
  std::array<Item, kMaxLanes> items;
  for (int first = 0; first < segments_; first += lanes) {
    const int count = std::min(lanes, segments_ - first);
    const std::span<const Item> used(items.data(), static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) items[static_cast<std::size_t>(i)] = {bottom_rows, first + i};
    fill_tile(used, &tile);
    cnn_bottom(*filters_, tile, &bottom);
    for (int i = 0; i < count; ++i) items[static_cast<std::size_t>(i)] = {top_rows, first + i};
    fill_tile(used, &tile);
    cnn_top(*filters_, tile, &top);
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < kSegmentColumns; ++c) {
        const int column = (first + i) * kSegmentColumns + c;
        if (column >= columns_) break;
        const int at = c * lanes + i;
        if (slide && first + i < first_rebuilt) {
          sums_[column] += bottom.interior.fixed[at] - top.interior.fixed[at];
        }
        boundary_[static_cast<std::size_t>(column)] = bottom.boundary[at] + top.boundary[at];
      }
    }
  }
}

// Sums all interior rows in the segments from first_segment on.
void MapStream::rebuild(int first_segment) {
  const std::int64_t first_row = num_rows_ - kHistoryRows;
  for (int r = 0; r < kHistoryRows; ++r) {
    if (load_row(first_row + r, rows_.data() + r * stride_)) continue;
    header_->clean_from = std::max(header_->clean_from, first_row + r + kHistoryRows + 1);
  }
  std::fill(sums_ + first_segment * kSegmentColumns, sums_ + columns_, 0);
  const int lanes = cnn_lanes();
  CnnTile tile;
  CnnInterior out;
  std::vector<Item> items;
  for (int r = kFirstInterior; r <= kLastInterior; ++r) {
    for (int s = first_segment; s < segments_; ++s) {
      items.push_back({rows_.data() + (r - kHalo) * stride_, s});
    }
  }
  for (std::size_t first = 0; first < items.size(); first += static_cast<std::size_t>(lanes)) {
    const std::span<const Item> used = std::span(items).subspan(
        first, std::min(static_cast<std::size_t>(lanes), items.size() - first));
    fill_tile(used, &tile);
    cnn_interior(*filters_, tile, &out);
    for (std::size_t i = 0; i < used.size(); ++i) {
      for (int c = 0; c < kSegmentColumns; ++c) {
        const int column = used[i].segment * kSegmentColumns + c;
        if (column < columns_) sums_[column] += out.fixed[c * lanes + static_cast<int>(i)];
      }
    }
  }
}

void MapStream::make_scores() {
  constexpr float kUnit = 1.0F / static_cast<float>(1 << kFixedBits);
  constexpr float kShare = 1.0F / static_cast<float>(kHistoryRows);
  scores_.resize(static_cast<std::size_t>(columns_));
  for (std::size_t c = 0; c < scores_.size(); ++c) {
    const float sum = static_cast<float>(sums_[c]) * kUnit + boundary_[c];
    scores_[c] = filters_->bias3 + sum * kShare;
  }
}

}  // namespace foretoken::kernels
