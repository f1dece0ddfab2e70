#include "kernels/cpu/map_stream.h"

#include <algorithm>

#include "kernels/cpu/best_blocks.h"
#include "kernels/cpu/history_rows.h"

namespace foretoken::kernels {
namespace {

constexpr int kLocalBlocks = kLocalTokens / kBlockTokens;
constexpr int kHalo = 2;           // columns that a segment sees on each side
constexpr int kFirstInterior = 2;  // window rows 2 .. 61 see no edge of the window
constexpr int kLastInterior = kHistoryRows - 3;

int padded(int columns) { return (columns + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

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
  stride_ = padded(columns_) + 2 * kMaxLanes;  // kernels work on whole vectors, and see kHalo more
  std::byte* memory = state.stream + static_cast<std::size_t>(layer * num_maps(state) + map) *
                                         map_stream_bytes(state.max_columns);
  header_ = reinterpret_cast<MapStreamHeader*>(memory);
  sums_ = reinterpret_cast<std::int32_t*>(memory + kMapStreamHeaderBytes);
  greatest_.resize(static_cast<std::size_t>(stride_));
  for (Edge* edge : {&bottom_, &top_, &rebuilt_}) {
    edge->interior.resize(static_cast<std::size_t>(stride_));
    edge->boundary.resize(static_cast<std::size_t>(stride_));
  }

  rows_.resize(static_cast<std::size_t>(2 * kTileRows * stride_));
  for (int r = 0; r < kTileRows; ++r) {
    load_window_row(kHistoryRows - kTileRows + r, row(r));
    load_window_row(r - 1, row(kTileRows + r));
  }
  evaluate_edge(filters.bottom, kBottomSide, cnn_bottom, row(0), &bottom_);
  evaluate_edge(filters.top, kTopSide, cnn_top, row(kTileRows), &top_);

  const int first_rebuilt = slide_sums();
  if (first_rebuilt < segments_) rebuild(first_rebuilt);
  header_->num_rows = num_rows_;
  header_->columns = columns_;
  make_scores();
  return num_rows_ >= header_->clean_from;
}

// Moves the sums by the row that enters and the row that leaves. The first segment that must be
// summed anew instead: a new column changes the two columns before it in all rows, since the edge
// that pads with zeros moves.
int MapStream::slide_sums() {
  const bool known = header_->num_rows > 0 && header_->columns <= columns_;
  const bool slide = known && header_->num_rows + 1 == num_rows_;
  if (!slide && !(known && header_->num_rows == num_rows_)) return 0;
  int first_rebuilt = segments_;
  if (header_->columns < columns_) {
    first_rebuilt = std::max(0, header_->columns - kHalo) / kSegmentColumns;
  }
  const int kept = std::min(columns_, first_rebuilt * kSegmentColumns);
  for (int c = 0; slide && c < kept; ++c) {
    const auto at = static_cast<std::size_t>(c);
    sums_[c] += bottom_.interior[at] - top_.interior[at];
  }
  return first_rebuilt;
}

// A row's candidates; zeros for rows before the first, and for what is no probability, so that
// sums stay exact: scores are then not to be used until the row has left the window.
void MapStream::load_window_row(int window_row, float* out) {
  const std::int64_t r = num_rows_ - kHistoryRows + window_row;
  std::fill_n(out, stride_, 0.0F);
  if (r < 0) return;
  float* values = out + kHalo;
  decode_history(static_cast<HistoryType>(state_->type), history_row(*state_, layer_, map_, r),
                 kSinkBlocks, columns_, values);
  int wrong = 0;
  for (int c = 0; c < columns_; ++c) {
    const bool good = is_probability(values[c]);
    wrong += good ? 0 : 1;
    values[c] = good ? values[c] : 0.0F;
  }
  if (wrong > 0) header_->clean_from = std::max(header_->clean_from, r + kHistoryRows + 1);
}

// What a segment of the last cnn_cold() needs. The answer depends on its 5 rows alone, so that a
// row leaves as it entered.
MapStream::Regime MapStream::regime(int segment) const {
  const int first = segment * kSegmentColumns;
  // Where conv2 pads with zeros, hidden values are not affine.
  if (segment == 0 || first + kSegmentColumns >= columns_) return Regime::kHot;
  const float* values = greatest_.data() + first;
  const float greatest = *std::max_element(values, values + kTileColumns);
  if (greatest < filters_->bottom.cold.limit) return Regime::kCold;
  return greatest < filters_->bottom.warm.limit ? Regime::kWarm : Regime::kHot;
}

// Evaluates 5 rows as if all segments from first_segment on were cold, and lists those that aren't.
void MapStream::classify(const CnnFolded& cold, const float* rows, int first_segment, Edge* out) {
  const int first = first_segment * kSegmentColumns;
  cnn_cold(cold, rows + first, stride_, columns_ - first, out->interior.data() + first,
           out->boundary.data() + first, greatest_.data() + first);
  for (int s = first_segment; s < segments_; ++s) {
    const Regime needed = regime(s);
    if (needed == Regime::kWarm) warm_.push_back({rows, s});
    if (needed == Regime::kHot) hot_.push_back({rows, s});
  }
}

// kernel(tile) for as many items as there are lanes; then store(item, lane) of each.
template <typename Kernel, typename Store>
void MapStream::run(std::span<const Item> items, const Kernel& kernel, const Store& store) const {
  const auto lanes = static_cast<std::size_t>(cnn_lanes());
  CnnTile tile;
  for (; !items.empty(); items = items.subspan(std::min(lanes, items.size()))) {
    fill_tile(items, &tile);
    kernel(tile);
    for (std::size_t lane = 0; lane < std::min(lanes, items.size()); ++lane) {
      store(items[lane], lane);
    }
  }
}

void MapStream::evaluate_edge(const CnnFilters::Folded& folded, const CnnSide& side, HotKernel hot,
                              const float* rows, Edge* out) {
  warm_.clear();
  hot_.clear();
  classify(folded.cold, rows, 0, out);
  CnnEdge result;
  const auto lanes = static_cast<std::size_t>(cnn_lanes());
  const auto store = [&](const Item& item, std::size_t lane) {
    const auto column = static_cast<std::size_t>(item.segment * kSegmentColumns);
    for (std::size_t c = 0; c < kSegmentColumns; ++c) {
      out->interior[column + c] = result.interior.fixed[c * lanes + lane];
      out->boundary[column + c] = result.boundary[c * lanes + lane];
    }
  };
  run(
      warm_, [&](const CnnTile& t) { cnn_warm(folded.warm, side, t, &result); }, store);
  run(
      hot_, [&](const CnnTile& t) { hot(*filters_, t, &result); }, store);
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

// Sums all interior rows in the segments from first_segment on.
void MapStream::rebuild(int first_segment) {
  rows_.resize(static_cast<std::size_t>(kHistoryRows * stride_));
  for (int r = 0; r < kHistoryRows; ++r) load_window_row(r, row(r));
  const int first = first_segment * kSegmentColumns;
  std::fill(sums_ + first, sums_ + columns_, 0);
  warm_.clear();
  hot_.clear();
  for (int r = kFirstInterior; r <= kLastInterior; ++r) {
    classify(filters_->bottom.cold, row(r - kHalo), first_segment, &rebuilt_);
    for (int s = first_segment; s < segments_; ++s) {
      if (regime(s) != Regime::kCold) continue;
      for (int c = s * kSegmentColumns; c < (s + 1) * kSegmentColumns; ++c) {
        sums_[c] += rebuilt_.interior[static_cast<std::size_t>(c)];
      }
    }
  }
  CnnEdge result;
  const auto lanes = static_cast<std::size_t>(cnn_lanes());
  const auto add = [&](const Item& item, std::size_t lane) {
    const int column = item.segment * kSegmentColumns;
    const int count = std::min(kSegmentColumns, columns_ - column);
    for (int c = 0; c < count; ++c) {
      sums_[column + c] += result.interior.fixed[static_cast<std::size_t>(c) * lanes + lane];
    }
  };
  run(
      warm_, [&](const CnnTile& t) { cnn_warm(filters_->bottom.warm, kBottomSide, t, &result); },
      add);
  run(
      hot_, [&](const CnnTile& t) { cnn_interior(*filters_, t, &result.interior); }, add);
}

void MapStream::make_scores() {
  constexpr float kUnit = 1.0F / static_cast<float>(1 << kFixedBits);
  constexpr float kShare = 1.0F / static_cast<float>(kHistoryRows);
  scores_.resize(static_cast<std::size_t>(columns_));
  for (std::size_t c = 0; c < scores_.size(); ++c) {
    const float sum = static_cast<float>(sums_[c]) * kUnit + bottom_.boundary[c] + top_.boundary[c];
    scores_[c] = filters_->bias3 + sum * kShare;
  }
}

}  // namespace foretoken::kernels
