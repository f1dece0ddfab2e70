// multiply_tile: the one inner loop of GEMM, GEMV and prefill attention.
#if defined(FORETOKEN_SIMD_TILE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FORETOKEN_SIMD_TILE_INL_H
#undef FORETOKEN_SIMD_TILE_INL_H
#else
#define FORETOKEN_SIMD_TILE_INL_H
#endif

#include "kernels/cpu/simd/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// A tile's sums and operands fill the register file: AVX2 12 + 2 + 1 of 16, AVX-512 24 + 2 + 1
// of 32.
constexpr int kTileColumns = 2 * kLanes;
constexpr int kTileRows = HWY_TARGET == HWY_AVX2 ? 6 : 12;

// A matrix of floats; data == null stands for zeros.
struct Rows {
  const float* data;
  std::ptrdiff_t stride;
  const float* row(int i) const { return data == nullptr ? nullptr : data + i * stride; }
};
struct OutRows {
  float* data;
  std::ptrdiff_t stride;
  float* row(int i) const { return data + i * stride; }
};

// c[i, :] = start[i, :] + sum over k of a[i, k] * b[k, :], for kRows rows and kVecs vectors of
// columns. Each element is summed over k in order in one accumulator, so a result depends on
// neither the tile's shape, nor the target, nor on where k was cut.
//   a [kRows, depth]  b [depth, kStride] of T  c, start [kRows, kVecs * kLanes]
template <int kRows, int kVecs, int kStride, typename T>
HWY_NOINLINE void multiply_tile(Rows a, const T* HWY_RESTRICT b, int depth, Rows start, OutRows c) {
  const FloatTag d;
  FloatVec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      sum[i][v] = start.data == nullptr ? hn::Zero(d) : hn::LoadU(d, start.row(i) + v * kLanes);
    }
  }
  for (int k = 0; k < depth; ++k) {
    // A whole panel at once is read from memory, not from a cache: 1 KiB ahead of the hardware.
    if constexpr (kVecs > 2) __builtin_prefetch(b + 16 * kStride);
    FloatVec column[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) column[v] = load_float(d, b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto factor = hn::Set(d, a.data[i * a.stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = hn::MulAdd(factor, column[v], sum[i][v]);
    }
    b += kStride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) hn::StoreU(sum[i][v], d, c.row(i) + v * kLanes);
  }
}

// The tile for `rows` in [1, kRows].
template <int kRows, int kVecs, int kStride, typename T>
HWY_INLINE void multiply_some_rows(int rows, Rows a, const T* b, int depth, Rows start, OutRows c) {
  if (rows == kRows) return multiply_tile<kRows, kVecs, kStride>(a, b, depth, start, c);
  if constexpr (kRows > 1) {
    multiply_some_rows<kRows - 1, kVecs, kStride>(rows, a, b, depth, start, c);
  }
}

// kTileColumns columns, any number of rows: b stays in the first-level cache, a streams.
template <int kStride, typename T>
HWY_INLINE void multiply_columns(int rows, Rows a, const T* b, int depth, Rows start, OutRows c) {
  for (int i = 0; i < rows; i += kTileRows) {
    multiply_some_rows<kTileRows, 2, kStride>(HWY_MIN(kTileRows, rows - i), {a.row(i), a.stride}, b,
                                              depth, {start.row(i), start.stride},
                                              {c.row(i), c.stride});
  }
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
