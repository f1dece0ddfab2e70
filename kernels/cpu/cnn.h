// The AttentionPredictor's CNN on SIMD lanes: what one map costs a step.
//
//   s[r, c] = w3 . relu(conv2(relu(conv1(A))))[r, c]        score[c] = b3 + mean over r of s[r, c]
//
// A lane holds a segment: 4 columns of outputs of one place in one map, with its 5 x 8 values of
// history. conv2's 3 taps along the columns are a Winograd product F(4, 3): 6 multiplications for 4
// outputs instead of 12 (Lavin and Gray, arXiv 1509.09308); along the rows it is summed plainly,
// so that the rows that come and go with the window can be recomputed alone (docs/predictor.md).
//
// Each output depends on its segment's values alone, in one order of operations: the same segment
// gives the same bits as it enters and as it leaves, in every lane. Which of cold, warm and whole
// network evaluates it must depend on those values alone too.
#pragma once

#include <cstdint>

#include "kernels/device.h"

namespace foretoken::kernels {

inline constexpr int kSegmentColumns = 4;
inline constexpr int kTileRows = 5;       // a row of outputs sees the 5 history rows around it
inline constexpr int kTileColumns = 8;    // 4 columns and 2 on each side
inline constexpr int kHiddenColumns = 6;  // 4 columns and 1 on each side
inline constexpr int kMaxLanes = 16;
inline constexpr int kFixedBits = 22;  // s is summed over rows as int32 of 2^-22
inline constexpr int kChannels1 = 16;
inline constexpr int kChannels2 = 32;

// The network where few of its relus can change sign: while every history value that a segment
// sees stays below a limit, worked out from the weights. All other channels are affine, so conv2
// and conv3 fold into stencils over the history and over the few hidden channels that are not.
// Exact: it drops relus that cannot act, nothing else.
struct CnnFolded {
  static constexpr int kFew = 4;         // such channels of conv1, and of conv2
  static constexpr int kHiddenRows = 4;  // that the outputs of a tile see
  static constexpr int kMaxOutputs = 2 + 3 * kFew;

  // A channel of conv2 whose relu may act, of one row of outputs; or the affine rest of the
  // interior row (first) or of the boundary rows (second).
  struct Output {
    float history[kTileRows * 5];
    float hidden[kFew][kHiddenRows][3];
    float at_zero;  // its value at zero history and hidden values
    float weight;   // of conv3
    bool relu;
    bool interior;
  };

  float limit;  // holds for history values below; 0: never
  int num_hidden;
  float conv1[kFew][9];
  float bias1[kFew];
  int num_outputs;
  Output outputs[kMaxOutputs];
};

// The 5 rows of a tile, and the hidden rows and rows of outputs that are made of them.
struct CnnSide {
  struct Hidden {
    int above, middle, below;  // tile rows
  };
  struct Row {
    int hidden[3];  // hidden rows above, middle, below
  };
  static constexpr int kOutside = -1;  // no such row in the window
  Hidden hidden[CnnFolded::kHiddenRows];
  Row rows[3];  // the interior one, then the two at the window's edge
};
// Window rows 59 .. 63, of which s[61], s[62], s[63].
inline constexpr CnnSide kBottomSide = {
    {{0, 1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, CnnSide::kOutside}},
    {{{0, 1, 2}}, {{1, 2, 3}}, {{2, 3, CnnSide::kOutside}}}};
// Window rows -1 .. 3, of which s[1] with row -1 in the window, s[1], s[0].
inline constexpr CnnSide kTopSide = {{{0, 1, 2}, {CnnSide::kOutside, 1, 2}, {1, 2, 3}, {2, 3, 4}},
                                     {{{0, 2, 3}}, {{1, 2, 3}}, {{CnnSide::kOutside, 1, 2}}}};

// Weights as the kernels read them. above, below: G g of F(4, 3), by blocks of 4 output channels.
struct CnnFilters {
  explicit CnnFilters(const PredictorWeights& weights);

  static constexpr int kPoints = 6;
  static constexpr int kBlock = 4;
  static constexpr int kBlocks = kChannels2 / kBlock;
  float conv1[kChannels1][9];
  float bias1[kChannels1];
  float above[kBlocks][kPoints][kChannels1][kBlock];     // conv2's tap row 0
  float below[kBlocks][kPoints][kChannels1][2][kBlock];  // tap rows 1 and 2
  float bias2[kChannels2];
  float conv3[kChannels2];
  float bias3;

  // Cold: no relu can act, so there are two outputs and no hidden channel. Warm: up to kFew can.
  struct Folded {
    CnnFolded cold;
    CnnFolded warm;
  };
  Folded bottom;
  Folded top;  // with the limits of bottom
};

// As many segments as the processor has lanes; [..., lane] with cnn_lanes() lanes, not kMaxLanes.
struct CnnTile {
  alignas(64) float values[kTileRows * kTileColumns * kMaxLanes];
  // 1 where the column lies in the CNN's range, else 0: conv2 pads with zeros there, not with
  // relu(bias1). Read only if at_edge.
  alignas(64) float inside[kHiddenColumns * kMaxLanes];
  bool at_edge;
};

// Outputs [kSegmentColumns, lane].
struct CnnInterior {
  alignas(64) std::int32_t fixed[kSegmentColumns * kMaxLanes];  // s * 2^22, saturated at +-8
};
struct CnnEdge {
  CnnInterior interior;
  alignas(64) float boundary[kSegmentColumns * kMaxLanes];
};

int cnn_lanes();

// The cold map of every column of 5 rows, valid or not: out[c] sees rows[r * stride + c + 0 .. 4].
// Writes `columns` of fixed and boundary, and of `greatest` the greatest value of each of the rows'
// columns + 4; all rounded up to kMaxLanes, and so much is read.
void cnn_cold(const CnnFolded& cold, const float* rows, int stride, int columns,
              std::int32_t* fixed, float* boundary, float* greatest);

// A tile's outputs, by the side that its rows are of. interior: the row that enters or leaves;
// boundary: the sum of the two rows at the window's edge.
void cnn_warm(const CnnFolded& warm, const CnnSide& side, const CnnTile& tile, CnnEdge* out);
void cnn_bottom(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out);
void cnn_top(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out);

// s of the tile's middle row alone, all 5 rows being inside the window.
void cnn_interior(const CnnFilters& filters, const CnnTile& tile, CnnInterior* out);

}  // namespace foretoken::kernels
