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
// gives the same bits from every function here, in every lane.
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

// While every history value that a segment sees stays below tau, no relu changes sign: s is an
// affine map of those 5 x 5 values, and a stencil gives it at a hundredth of the work.
struct CnnAffine {
  float interior[kTileRows * 5];  // of the tile's middle row
  float boundary[kTileRows * 5];  // of the two rows at the window's edge, summed
  float interior_at_zero;
  float boundary_at_zero;
};

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
  float tau;  // negative: nothing is affine
  CnnAffine bottom;
  CnnAffine top;
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

// The affine map of every column of 5 rows, sensible or not: out[c] sees rows[r * stride + c +
// 0..4]. Writes `columns` of fixed and boundary, and the greatest value of each of columns + 4 in
// the rows; all rounded up to kMaxLanes, and so much is read.
void cnn_affine(const CnnAffine& map, const float* rows, int stride, int columns,
                std::int32_t* fixed, float* boundary, float* greatest);

// s of the tile's middle row, all 5 rows being inside the window.
void cnn_interior(const CnnFilters& filters, const CnnTile& tile, CnnInterior* out);
// The tile holds window rows 59..63: interior = s[61], which enters; boundary = s[62] + s[63].
void cnn_bottom(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out);
// The tile holds window rows -1..3: interior = s[1] as it was with row -1 in the window, which
// leaves; boundary = s[0] + s[1].
void cnn_top(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out);

}  // namespace foretoken::kernels
