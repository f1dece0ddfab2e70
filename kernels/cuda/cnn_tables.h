// The predictor's network in the form that tensor cores take it: fragments of mma.m16n8k16, by lane
// (mma.cuh), in fp16. docs/predictor.md derives the streaming evaluation and the cold regime.
//
// History values come scaled by 2^12, s goes out in 2^-22. Hidden values are held as
//   h' = max(conv1(A), -b1)       so that h = h' + b1, and h = 0 (padding) is h' = -b1
// and of conv2 D = conv2(h') alone is computed; its bias B takes in conv2 of b1:
//   s = sum of w3 * (max(D, -B) + B)
// So the products carry deviations, not biases, and fp16 loses little.
#pragma once

#include <cstdint>

#include "kernels/cuda/map_layout.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

inline constexpr int kLanes = 32;
inline constexpr float kValueScale = 4096.0F;
inline constexpr std::int32_t kMostAtZero = 1 << 29;  // |CnnTables::at_zero|
// |s| is cut off here, and what the two rows at an edge add, far beyond what attention has: so that
// a window's 60 interior rows and both edges fit int32. Where a cold stencil might pass it, no
// segment is cold.
inline constexpr std::int32_t kMostInterior = 7 << kFixedPointBits;
inline constexpr std::int32_t kMostEdge = 32 << kFixedPointBits;
static_assert((kHistoryRows - 4) * std::int64_t{kMostInterior} + 2 * std::int64_t{kMostEdge} <
              std::int64_t{1} << 31);

// Rows of outputs that differ in the taps of conv2 that lie in the window.
enum OutputRow { kInnerRow, kFirstRow, kLastRow, kNumOutputRows };
// How conv1's three rows of taps lie on four rows of history: on the first three, on the last
// three, or on the first three with no tap on the first (the row before the window).
enum TapRows { kUpperTaps, kLowerTaps, kCutTaps, kNumTapRows };
// The window's two edges: rows 59 .. 63, or -1 .. 3.
enum Side { kBottom, kTop, kNumSides };
// How the cold stencils take history values: as fp16, scaled like the network's; or bf16, as rows
// of that type hold them, times taps in two parts of bf16.
enum ColdOperand { kScaledHalf, kPlainBf16, kNumColdOperands };

struct CnnTables {
  std::uint32_t conv2[9][2][kLanes][4];               // [tap, half of the outputs]: operand A
  std::uint32_t conv1[kNumTapRows][2][2][kLanes][2];  // [, column of a pair, half]: operand B
  std::uint32_t minus_bias1[2][kLanes];               // [half]: as conv1's result
  float minus_bias2[kNumOutputRows][4][kLanes];       // of the lane's outputs: 8 i + lane / 4
  float conv3[4][kLanes];                             // likewise
  std::int32_t at_zero[kNumOutputRows];               // sum of w3 * B

  // Cold: columns 0 .. 3 of a segment, of the row that enters or leaves, then of the two at the
  // edge; a product over 5 rows (and one of zeros) x 8 columns.
  // [, , product]: operand B's registers, then those of what rounding the taps left (bf16).
  alignas(16) std::uint32_t cold[kNumColdOperands][kNumSides][3][kLanes][4];
  float cold_at_zero[kNumSides][2];            // [, inner or edge]
  std::uint32_t cold_limit[kNumColdOperands];  // an operand's bits: cold below
};

// Throws Exception(kModelFile) for weights that operands or fixed-point sums may not hold.
CnnTables make_cnn_tables(const PredictorWeights& weights);

}  // namespace foretoken::kernels::cuda
