// Matrix multiplication by weights that stay in their own 16-bit type.
//
// Weights are packed once, a panel of 32 output features after the other, so that one multiply
// reads them as one stream:
//
//   packed [panels, columns, 32] of the weights' type; the last panel's missing features are 0
//
// Every element of a product is one sum over the input features in order, with FMA, whatever the
// number of rows, threads or ranks, and on AVX2 as on AVX-512: results are equal to the bit.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/kv_layout.h"

namespace foretoken::kernels::simd {

inline constexpr int kPanelColumns = 32;
// Up to this many rows are multiplied straight from the 16-bit weights. For more, panels are first
// converted to float a piece at a time. Measured: docs/measurements.md#cpu-gemm.
inline constexpr int kMaxDirectRows = 12;

// Packs up to 32 rows of weights, `columns` long and of `type`, into one panel.
void pack_panel(std::span<const std::byte* const> rows, DataType type, int columns, void* panel);

struct MultiplyArgs {
  const float* x;      // [rows, depth]
  const void* packed;  // [panels, depth, 32]
  DataType type;
  const float* bias;  // [columns], or null
  int rows;
  int depth;
  int columns;
  float* out;  // [rows, columns]
  const float*
      residual;  // [rows, columns] that sums start from, or null; may be out; not with bias
};

// out[first_row .. +rows, panels' columns]: one task of a product.
struct MultiplyPart {
  int first_row;
  int num_rows;
  int first_panel;
  int num_panels;
};
void multiply(const MultiplyArgs& args, const MultiplyPart& part);

}  // namespace foretoken::kernels::simd
