// The streaming evaluation of one map: its scores from its ring of history rows, at the cost of
// the rows that changed. docs/predictor.md derives it.
//
// State of a map between steps (HistoryState::stream): a header, then the int32 sum of the window's
// interior rows 2..61 a candidate column, in units of 2^-22. Bytes of zero are "nothing summed".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/cnn.h"
#include "kernels/device.h"

namespace foretoken::kernels {

struct MapStreamHeader {
  std::int64_t num_rows;    // rows appended when the sums were made; 0: there are none
  std::int64_t clean_from;  // windows that end before this row hold a value that is none
  std::int32_t columns;     // candidate columns of the sums
};
inline constexpr std::size_t kMapStreamHeaderBytes = 64;
std::size_t map_stream_bytes(int max_columns);

// Candidate columns of a row of n columns: all but sink and the last local window.
int num_candidates(int columns);

// Memory of a thread, kept from map to map.
class MapStream {
 public:
  // Brings the map's state to its newest row, and returns the candidates' scores, valid until the
  // next call. False: the window holds a value that is no probability, so scores mean nothing.
  bool update(const CnnFilters& filters, const HistoryState& state, int layer, int map);
  std::span<const float> scores() const { return scores_; }

 private:
  // A lane's work: a segment of the 5 rows that start at `rows`.
  struct Item {
    const float* rows;
    int segment;
  };
  // s of the rows at one edge of the window, by candidate column.
  struct Edge {
    std::vector<std::int32_t> interior;  // the row that enters or leaves
    std::vector<float> boundary;         // the two rows at the edge, summed
  };
  enum class Regime { kCold, kWarm, kHot };
  using HotKernel = void (*)(const CnnFilters&, const CnnTile&, CnnEdge*);

  float* row(int i) { return rows_.data() + i * stride_; }
  void load_window_row(int window_row, float* out);
  Regime regime(int segment) const;
  void classify(const CnnFolded& cold, const float* rows, int first_segment, Edge* out);
  template <typename Kernel, typename Store>
  void run(std::span<const Item> items, const Kernel& kernel, const Store& store) const;
  void evaluate_edge(const CnnFilters::Folded& folded, const CnnSide& side, HotKernel hot,
                     const float* rows, Edge* out);
  int slide_sums();
  void rebuild(int first_segment);
  void fill_tile(std::span<const Item> items, CnnTile* tile) const;
  void make_scores();

  const CnnFilters* filters_ = nullptr;
  const HistoryState* state_ = nullptr;
  int layer_ = 0;
  int map_ = 0;
  MapStreamHeader* header_ = nullptr;
  std::int32_t* sums_ = nullptr;
  std::int64_t num_rows_ = 0;
  int columns_ = 0;  // candidates
  int segments_ = 0;
  int stride_ = 0;  // of rows_

  std::vector<float> rows_;  // [row, 2 + columns + padding]; zero outside the candidates
  std::vector<float> greatest_;
  std::vector<Item> warm_;
  std::vector<Item> hot_;
  Edge bottom_;
  Edge top_;
  Edge rebuilt_;
  std::vector<float> scores_;
};

}  // namespace foretoken::kernels
