// The predictor's CNN on tensor cores, by the warp: the cold stencil of 16 segments of 4 columns,
// and the whole network of 8 segments. cnn_tables.h says what the fragments hold.
//
// All sums over rows are of integers, and s of a segment in a row depends on its 5 x 8 values
// alone, in one order of operations: a row leaves as it entered, wherever it was evaluated. Which
// of cold and whole network does it depends on those values alone, too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/cnn_tables.h"
#include "kernels/cuda/map_layout.h"
#include "kernels/cuda/mma.cuh"

namespace foretoken::kernels::cuda {

__device__ inline __half2 as_half2(std::uint32_t pair) {
  return reinterpret_cast<const __half2&>(pair);
}
__device__ inline std::uint32_t max_pair(std::uint32_t a, std::uint32_t b) {
  const __half2 most = __hmax2(as_half2(a), as_half2(b));
  return reinterpret_cast<const std::uint32_t&>(most);
}

// ---- cold ------------------------------------------------------------------------------------

// The tables that the cold stencil needs, of one kind of operands; in shared memory.
struct ColdTables {
  uint4 taps[kNumSides][3][kLanes];
  float at_zero[kNumSides][2];
  std::uint32_t limit;

  __device__ void load(const CnnTables& from, ColdOperand operand) {
    const auto* source = reinterpret_cast<const uint4*>(&from.cold[operand][0][0][0][0]);
    uint4* target = &taps[0][0][0];
    for (unsigned i = threadIdx.x; i < sizeof taps / sizeof(uint4); i += blockDim.x) {
      target[i] = source[i];
    }
    if (threadIdx.x < 4) (&at_zero[0][0])[threadIdx.x] = (&from.cold_at_zero[0][0])[threadIdx.x];
    if (threadIdx.x == 0) limit = from.cold_limit[operand];
  }
};

// values[i][half]: of the five rows that a segment's output sees, row i's columns 2 q - 2, 2 q - 1,
// of output g + 8 half (lane = 4 g + q): of another segment, or another row. As operands: their
// bits are in the order of their values, what is none of [0, 2] above all.
struct ColdRows {
  std::uint32_t values[5][2];
  std::uint32_t most[2];  // over the rows

  __device__ void find_most() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = __vimax3_u16x2(values[0][half], values[1][half], values[2][half]);
      most[half] = __vimax3_u16x2(most[half], values[3][half], values[4][half]);
    }
  }
};

// d += taps of rows 2 k and 2 k + 1: of all stencils, one after the other, as what is added to one
// waits for what was before.
template <ColdOperand kOperand, std::size_t kCount>
__device__ void add_cold_products(const uint4 (&taps)[kCount], const std::uint32_t (&a)[kCount][4],
                                  float (&d)[kCount][4]) {
  constexpr bool kTwoParts = kOperand == kPlainBf16;
  using Operand = std::conditional_t<kTwoParts, __nv_bfloat16, __half>;
#pragma unroll
  for (std::size_t i = 0; i < kCount; ++i) mma<Operand>(d[i], a[i], taps[i].x, taps[i].y);
  if constexpr (kTwoParts) {
#pragma unroll
    for (std::size_t i = 0; i < kCount; ++i) mma<Operand>(d[i], a[i], taps[i].z, taps[i].w);
  }
}

// out[half]: columns 2 (q % 2), + 1 of segment g + 8 half; of the inner row where q < 2, else of
// the edge. Worth nothing of a segment that is not cold.
__device__ inline void round_products(const float (&d)[4], int2 (&out)[2]) {
  out[0] = {__float2int_rn(d[0]), __float2int_rn(d[1])};
  out[1] = {__float2int_rn(d[2]), __float2int_rn(d[3])};
}

template <ColdOperand kOperand>
__device__ void cold_products(const ColdTables& tables, int side, const ColdRows& rows,
                              int2 (&out)[2]) {
  const unsigned lane = threadIdx.x % 32;
  const float at_zero = tables.at_zero[side][lane % 4 / 2];
  float d[1][4] = {{at_zero, at_zero, at_zero, at_zero}};
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const auto& even = rows.values[2 * k];
    const std::uint32_t a[1][4] = {{even[0], even[1], k < 2 ? rows.values[2 * k + 1][0] : 0,
                                    k < 2 ? rows.values[2 * k + 1][1] : 0}};
    const uint4 taps[1] = {tables.taps[side][k][lane]};
    add_cold_products<kOperand>(taps, a, d);
  }
  round_products(d[0], out);
}

// seen: the greatest that this lane sees of outputs g and g + 8, two operands each. Bit 0: g is
// cold, bit 1: g + 8 is. All that such a one sees stays below the limit.
__device__ inline unsigned find_cold(const ColdTables& tables, const std::uint32_t (&seen)[2]) {
  // Of g in the low half, of g + 8 in the high one.
  std::uint32_t most =
      __vmaxu2(__byte_perm(seen[0], seen[1], 0x5410), __byte_perm(seen[0], seen[1], 0x7632));
  most = __vmaxu2(most, __shfl_xor_sync(~0U, most, 1));
  most = __vmaxu2(most, __shfl_xor_sync(~0U, most, 2));
  return ((most & 0xFFFFU) < tables.limit ? 1U : 0U) | (most >> 16 < tables.limit ? 2U : 0U);
}

// Where conv2 pads with zeros, hidden values are not affine.
__device__ inline bool at_edge(int first_column, int columns) {
  return first_column == 0 || first_column + kSegmentWidth >= columns;
}

// ---- the whole network -----------------------------------------------------------------------

// conv2's weights, in the registers of a warp for as long as it lives.
struct HotWeights {
  std::uint32_t conv2[9][2][4];
  std::uint32_t minus_bias1[2];

  __device__ void load(const CnnTables& from) {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 18; ++i) {
      const uint4 word = *reinterpret_cast<const uint4*>(from.conv2[i / 2][i % 2][lane]);
      conv2[i / 2][i % 2][0] = word.x;
      conv2[i / 2][i % 2][1] = word.y;
      conv2[i / 2][i % 2][2] = word.z;
      conv2[i / 2][i % 2][3] = word.w;
    }
    minus_bias1[0] = from.minus_bias1[0][lane];
    minus_bias1[1] = from.minus_bias1[1][lane];
  }
};

// The tables that are read from shared memory.
struct HotTables {
  uint2 conv1[kNumTapRows][2][2][kLanes];  // [, column of a pair, half]
  float minus_bias2[kNumOutputRows][4][kLanes];
  float conv3[4][kLanes];
  std::int32_t at_zero[kNumOutputRows];

  // By kThreads threads, with all loads on their way at once.
  template <unsigned kThreads>
  __device__ void load(const CnnTables& from) {
    constexpr unsigned kTaps = sizeof conv1 / sizeof(uint2);
    constexpr unsigned kBiases = sizeof minus_bias2 / sizeof(float);
    static_assert(kTaps % kThreads == 0 && kBiases % kThreads == 0 &&
                  sizeof conv3 / sizeof(float) == kThreads);
#pragma unroll
    for (unsigned first = 0; first < kTaps; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      (&conv1[0][0][0][0])[i] = reinterpret_cast<const uint2*>(&from.conv1[0][0][0][0][0])[i];
    }
#pragma unroll
    for (unsigned first = 0; first < kBiases; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      (&minus_bias2[0][0][0])[i] = (&from.minus_bias2[0][0][0])[i];
    }
    (&conv3[0][0])[threadIdx.x] = (&from.conv3[0][0])[threadIdx.x];
    if (threadIdx.x < kNumOutputRows) at_zero[threadIdx.x] = from.at_zero[threadIdx.x];
  }
};

// What is evaluated of a segment's 5 history rows: those at the window's bottom, at its top, or any
// five inside, of which the middle row's s alone.
enum class HotKind { kBottom, kTop, kInner };

// 8 segments' history: lane 4 g + q holds, of segment g, row q of the first four of the five rows
// (upper) and row q + 2 (lower; none for q = 3), as 4 pairs of columns -2 .. 5. Two neighbouring
// pairs are an operand A of conv1, which gives two columns of hidden values.
struct HotRows {
  std::uint32_t operand[3][4];

  __device__ HotRows(const std::uint32_t (&upper)[4], const std::uint32_t (&lower)[4])
      : operand{{upper[0], lower[0], upper[1], lower[1]},
                {copy(upper[1]), copy(lower[1]), copy(upper[2]), copy(lower[2])},
                {upper[2], lower[2], upper[3], lower[3]}} {}

 private:
  // An operand's registers are neighbours, so the one in the middle has its own. The compiler would
  // fill them again for every product, if it knew that they equal others: that grids have one
  // dimension it does not know.
  __device__ static std::uint32_t copy(std::uint32_t pair) { return pair + blockIdx.y; }
};

// Hidden values of one column: [row][half of the channels], as operand B of conv2.
//   kBottom, kInner   rows 60, 61, 62 and 63 as the window's last
//   kTop              row 0 as the window's first, rows 0, 1, 2
using HiddenColumn = std::uint32_t[4][2];

// Hidden column `column` of 0 .. 5, which stand for columns -1 .. 4 of the segment. outside: this
// lane's segment has no such column, and conv2 sees zeros there.
template <HotKind kKind>
__device__ void hidden_column(const HotTables& tables, const HotWeights& weights,
                              const HotRows& rows, int column, bool outside, HiddenColumn& out) {
  constexpr std::uint32_t kMinusInfinity = 0xFC00FC00;  // leaves -b1 of the maximum
  const std::uint32_t base = outside ? kMinusInfinity : 0;
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto product = [&](TapRows taps, std::uint32_t(&d)[2]) {
      const uint2 b = tables.conv1[taps][column % 2][half][lane];
      d[0] = base;
      d[1] = base;
      mma_half(d, rows.operand[column / 2], b.x, b.y);
      d[0] = max_pair(d[0], weights.minus_bias1[half]);
      d[1] = max_pair(d[1], weights.minus_bias1[half]);
    };
    std::uint32_t upper[2];
    std::uint32_t lower[2];
    product(kUpperTaps, upper);
    product(kLowerTaps, lower);
    if constexpr (kKind == HotKind::kTop) {
      std::uint32_t cut[2];
      product(kCutTaps, cut);
      out[0][half] = cut[0];
      out[1][half] = upper[0];
      out[2][half] = lower[0];
      out[3][half] = upper[1];
    } else {
      out[0][half] = upper[0];
      out[1][half] = lower[0];
      out[2][half] = upper[1];
      out[3][half] = lower[1];
    }
  }
}

// D of one row and column of outputs: [half of the outputs], operand D.
using OutputColumn = float[2][4];

// What a row of outputs takes of one hidden row, through a row of conv2's taps.
struct TapRow {
  OutputColumn& d;
  const OutputColumn& c;
  int taps;
  int hidden;
};

// d = c + taps of a hidden row, for several outputs: by columns, so that the products of one
// output, which wait for each other, have those of the others between them.
template <std::size_t kCount>
__device__ inline void add_products(const HotWeights& weights, const HiddenColumn& left,
                                    const HiddenColumn& middle, const HiddenColumn& right,
                                    const TapRow (&rows)[kCount]) {
#pragma unroll
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto& b = left[rows[i].hidden];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma_to(rows[i].d[half], rows[i].c[half], weights.conv2[rows[i].taps * 3][half], b[0], b[1]);
    }
  }
#pragma unroll
  for (int column = 1; column < 3; ++column) {
    const HiddenColumn& from = column == 1 ? middle : right;
#pragma unroll
    for (std::size_t i = 0; i < kCount; ++i) {
      const auto& b = from[rows[i].hidden];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma<__half>(rows[i].d[half], weights.conv2[rows[i].taps * 3 + column][half], b[0], b[1]);
      }
    }
  }
}

// This lane's part of s: of 4 output channels, for segments 2 q and 2 q + 1.
__device__ inline void add_outputs(const OutputColumn& d, const HotTables& tables, OutputRow row,
                                   float (&s)[2]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float weight = tables.conv3[k][lane];
    const float least = tables.minus_bias2[row][k][lane];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[i] = fmaf(weight, fmaxf(d[k / 2][k % 2 * 2 + i], least), s[i]);
    }
  }
}

// Adds `first` up over two lanes whose g differs in one bit, and `second` too: the lane that has
// the bit gets the second sum, the other one the first. A sum is the same whichever lane gets it.
__device__ inline float add_halves(float first, float second, unsigned bit) {
  const bool takes_second = (threadIdx.x / 4 & bit) != 0;
  const float kept = takes_second ? second : first;
  const float sent = takes_second ? first : second;
  return kept + __shfl_xor_sync(~0U, sent, 4 * bit);
}
// Of s[column][segment], over all g: each lane gets that of its result. Cut off where it and two
// biases' share (at_zero) would not fit int32.
__device__ inline std::int32_t round_sum(const float (&s)[4][2]) {
  float of_two[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    of_two[i] = add_halves(add_halves(s[2 * i][0], s[2 * i][1], 1),
                           add_halves(s[2 * i + 1][0], s[2 * i + 1][1], 1), 2);
  }
  constexpr float kMost = kMostAtZero;
  return __float2int_rn(fminf(fmaxf(add_halves(of_two[0], of_two[1], 4), -kMost), kMost));
}

__device__ inline std::int32_t bounded(std::int32_t value, std::int32_t most) {
  return min(max(value, -most), most);
}

// What a lane gets of 8 segments: column `column` of segment `segment`.
struct HotResult {
  std::int32_t inner;  // s of the row that enters, leaves or lies inside
  std::int32_t edge;   // of the two at the window's edge; not of kInner
};
__device__ inline int result_segment() {
  return static_cast<int>(threadIdx.x % 4 * 2 + threadIdx.x / 4 % 2);
}
__device__ inline int result_column() { return static_cast<int>(threadIdx.x % 32 / 8); }

// first_column: of this lane's segment g; columns: candidates of its map.
template <HotKind kKind>
__device__ HotResult evaluate_hot(const HotTables& tables, const HotWeights& weights,
                                  const HotRows& rows, int first_column, int columns) {
  constexpr bool kInner = kKind == HotKind::kInner;
  constexpr OutputRow kEdge = kKind == HotKind::kTop ? kFirstRow : kLastRow;
  float inner[4][2] = {};  // [column, segment]
  float edge[4][2] = {};
  HiddenColumn hidden[4];  // by column % 4
#pragma unroll
  for (int column = 0; column < 6; ++column) {
    HiddenColumn& made = hidden[column % 4];
    const int at = first_column + column - 1;
    hidden_column<kKind>(tables, weights, rows, column, at < 0 || at >= columns, made);
    if (column < 2) continue;
    const HiddenColumn& left = hidden[(column - 2) % 4];
    const HiddenColumn& middle = hidden[(column - 1) % 4];
    OutputColumn first = {};   // the inner row
    OutputColumn second = {};  // row 62 or 1
    OutputColumn third = {};   // row 63 or 0
    const auto add = [&]<std::size_t kCount>(const TapRow(&taps)[kCount]) {
      add_products(weights, left, middle, made, taps);
    };
    // Of an output, the same order in all kinds.
    if constexpr (kKind == HotKind::kTop) {
      add({{first, first, 1, 2}, {third, third, 1, 0}});
      add({{first, first, 2, 3}, {third, third, 2, 2}});
      add({{second, first, 0, 0}, {first, first, 0, 1}});
    } else if constexpr (kInner) {
      add({{first, first, 1, 1}});
      add({{first, first, 2, 2}});
      add({{first, first, 0, 0}});
    } else {
      add({{first, first, 1, 1}, {second, second, 1, 2}, {third, third, 1, 3}});
      add({{first, first, 2, 2}, {second, second, 2, 3}, {third, third, 0, 2}});
      add({{first, first, 0, 0}, {second, second, 0, 1}});
    }
    add_outputs(first, tables, kInnerRow, inner[column - 2]);
    if constexpr (!kInner) {
      add_outputs(second, tables, kInnerRow, edge[column - 2]);
      add_outputs(third, tables, kEdge, edge[column - 2]);
    }
  }
  HotResult result{bounded(round_sum(inner) + tables.at_zero[kInnerRow], kMostInterior), 0};
  if constexpr (!kInner) {
    result.edge =
        bounded(round_sum(edge) + tables.at_zero[kInnerRow] + tables.at_zero[kEdge], kMostEdge);
  }
  return result;
}

}  // namespace foretoken::kernels::cuda
