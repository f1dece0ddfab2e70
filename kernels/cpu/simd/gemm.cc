#include "kernels/cpu/simd/gemm.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd/gemm.cc"
#include "kernels/cpu/simd/targets.h"
// Below Highway's choice of targets.
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// Input features converted at a time, at most: a tile's share of them (20 KiB) fits the first-level
// cache.
constexpr int kMaxDepth = 320;

// Where a panel's columns go: straight to out, or, for the matrix's last columns, through a
// buffer of full width.
class PanelOutput {
 public:
  PanelOutput(const MultiplyArgs& args, int panel)
      : args_(args),
        column_(panel * kPanelColumns),
        width_(std::min(kPanelColumns, args.columns - column_)) {
    for (int i = 0; i < kPanelColumns; ++i) {
      bias_[i] = args.bias != nullptr && i < width_ ? args.bias[column_ + i] : 0.0F;
    }
  }
  bool whole() const { return width_ == kPanelColumns; }
  // What the sums of a whole panel's rows start from.
  Rows start(int row, int offset) const {
    if (args_.residual == nullptr) return {bias_ + offset, 0};
    return {args_.residual + static_cast<std::ptrdiff_t>(row) * args_.columns + column_ + offset,
            args_.columns};
  }
  OutRows at(int row, int offset) const {
    return {args_.out + static_cast<std::ptrdiff_t>(row) * args_.columns + column_ + offset,
            args_.columns};
  }
  // ... of the last panel's, laid out as wide as a whole one, in `to`.
  Rows start(int row, int rows, float* to) const {
    if (args_.residual == nullptr) return {bias_, 0};
    for (int i = 0; i < rows; ++i) {
      std::fill_n(to + i * kPanelColumns, kPanelColumns, 0.0F);
      std::memcpy(to + i * kPanelColumns, start(row + i, 0).data,
                  static_cast<std::size_t>(width_) * sizeof(float));
    }
    return {to, kPanelColumns};
  }
  // Copies the columns that exist of rows [row, row + rows) of `from`.
  void copy(int row, int rows, const float* from) const {
    for (int i = 0; i < rows; ++i) {
      std::memcpy(at(row + i, 0).data, from + i * kPanelColumns,
                  static_cast<std::size_t>(width_) * sizeof(float));
    }
  }

 private:
  const MultiplyArgs& args_;
  int column_;
  int width_;
  float bias_[kPanelColumns];
};

Rows x_rows(const MultiplyArgs& args, int row, int k) {
  return {args.x + static_cast<std::ptrdiff_t>(row) * args.depth + k, args.depth};
}

// One or two rows take a panel at once: sums enough to hide the latency of FMA, and one stream.
template <typename T>
void multiply_direct(const MultiplyArgs& args, int row, int rows, const T* panel, Rows start,
                     OutRows out) {
  constexpr int kWide = kPanelColumns / kLanes;
  const Rows x = x_rows(args, row, 0);
  if (rows <= 2) {
    return multiply_some_rows<2, kWide, kPanelColumns>(rows, x, panel, args.depth, start, out);
  }
  for (int column = 0; column < kPanelColumns; column += kTileColumns) {
    multiply_columns<kPanelColumns>(rows, x, panel + column, args.depth,
                                    {start.data + column, start.stride},
                                    {out.data + column, out.stride});
  }
}

template <typename T>
void multiply_few_rows(const MultiplyArgs& args, const MultiplyPart& part, const T* packed) {
  for (int p = part.first_panel; p < part.first_panel + part.num_panels; ++p) {
    const T* panel = packed + static_cast<std::ptrdiff_t>(p) * args.depth * kPanelColumns;
    const PanelOutput output(args, p);
    if (output.whole()) {
      multiply_direct(args, part.first_row, part.num_rows, panel, output.start(part.first_row, 0),
                      output.at(part.first_row, 0));
    } else {
      float buffer[kMaxDirectRows * kPanelColumns];
      multiply_direct(args, part.first_row, part.num_rows, panel,
                      output.start(part.first_row, part.num_rows, buffer), {buffer, kPanelColumns});
      output.copy(part.first_row, part.num_rows, buffer);
    }
  }
}

// Features [begin, begin + depth) of a panel, as float: [32 / kTileColumns, depth, kTileColumns].
template <typename T>
void convert_panel(const T* panel, int begin, int depth, float* to) {
  const FloatTag d;
  const T* from = panel + static_cast<std::ptrdiff_t>(begin) * kPanelColumns;
  for (int k = 0; k < depth; ++k, from += kPanelColumns) {
    for (int column = 0; column < kPanelColumns; column += kLanes) {
      float* tile = to + static_cast<std::ptrdiff_t>(column / kTileColumns) * depth * kTileColumns;
      hn::StoreU(load_float(d, from + column), d, tile + k * kTileColumns + column % kTileColumns);
    }
  }
}

// Adds the product over features [begin, begin + depth) to the rows of one panel.
void multiply_converted(const MultiplyArgs& args, const MultiplyPart& part, int begin, int depth,
                        const float* tiles, const PanelOutput& output) {
  for (int column = 0; column < kPanelColumns; column += kTileColumns) {
    const float* tile = tiles + static_cast<std::ptrdiff_t>(column) * depth;
    const OutRows out = output.at(part.first_row, column);
    const Rows start =
        begin == 0 ? output.start(part.first_row, column) : Rows{out.data, out.stride};
    multiply_columns<kTileColumns>(part.num_rows, x_rows(args, part.first_row, begin), tile, depth,
                                   start, out);
  }
}

template <typename T>
void multiply_many_rows(const MultiplyArgs& args, const MultiplyPart& part, const T* packed) {
  alignas(64) float tiles[kMaxDepth * kPanelColumns];
  const int steps = (args.depth + kMaxDepth - 1) / kMaxDepth;
  const int end = part.first_panel + part.num_panels;
  for (int step = 0; step < steps; ++step) {
    const int begin = args.depth * step / steps;
    const int depth = args.depth * (step + 1) / steps - begin;
    for (int p = part.first_panel; p < end; ++p) {
      const PanelOutput output(args, p);
      if (!output.whole()) continue;
      const T* panel = packed + static_cast<std::ptrdiff_t>(p) * args.depth * kPanelColumns;
      convert_panel(panel, begin, depth, tiles);
      multiply_converted(args, part, begin, depth, tiles, output);
    }
  }
  // The matrix's last columns, less than a panel: through the buffer of the few.
  if (end * kPanelColumns <= args.columns) return;
  for (int row = 0; row < part.num_rows; row += kMaxDirectRows) {
    multiply_few_rows(
        args, {part.first_row + row, std::min(kMaxDirectRows, part.num_rows - row), end - 1, 1},
        packed);
  }
}

void multiply_part(const MultiplyArgs& args, const MultiplyPart& part) {
  with_type(args.type, args.packed, [&](const auto* packed) {
    if (part.num_rows <= kMaxDirectRows) {
      multiply_few_rows(args, part, packed);
    } else {
      multiply_many_rows(args, part, packed);
    }
  });
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace foretoken::kernels::simd {
namespace {

template <typename T>
void pack(std::span<const std::byte* const> rows, int columns, T* to) {
  for (int k = 0; k < columns; ++k, to += kPanelColumns) {
    std::fill_n(to, kPanelColumns, T{0});
    for (std::size_t i = 0; i < rows.size(); ++i) {  // rows of a file may lie at odd places
      std::memcpy(to + i, rows[i] + static_cast<std::size_t>(k) * sizeof(T), sizeof(T));
    }
  }
}

}  // namespace

void pack_panel(std::span<const std::byte* const> rows, DataType type, int columns, void* panel) {
  FT_CHECK(rows.size() <= kPanelColumns, rows.size());
  if (type == DataType::kFp32) return pack(rows, columns, static_cast<float*>(panel));
  pack(rows, columns, static_cast<std::uint16_t*>(panel));
}

HWY_EXPORT(multiply_part);
void multiply(const MultiplyArgs& args, const MultiplyPart& part) {
  HWY_DYNAMIC_DISPATCH(multiply_part)(args, part);
}

}  // namespace foretoken::kernels::simd
#endif  // HWY_ONCE
