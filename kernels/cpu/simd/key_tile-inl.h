// Tiles of keys and values as float, in the form multiply_columns() reads, and query rows.
#if defined(FORETOKEN_SIMD_KEY_TILE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FORETOKEN_SIMD_KEY_TILE_INL_H
#undef FORETOKEN_SIMD_KEY_TILE_INL_H
#else
#define FORETOKEN_SIMD_KEY_TILE_INL_H
#endif

#include <algorithm>

#include "kernels/cpu/simd/prefill_attention.h"
#include "kernels/cpu/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// [8 keys, 8 dimensions] of a 16-bit type, transposed: [8 dimensions, kTileColumns] as float.
template <typename T>
HWY_INLINE void transpose_8x8(const T* from, std::ptrdiff_t from_stride, float* to) {
  const hn::FixedTag<std::uint16_t, 8> d16;
  const hn::FixedTag<std::uint32_t, 4> d32;
  const hn::FixedTag<std::uint64_t, 2> d64;
  hn::Vec<decltype(d32)> half[2][4];  // dimensions 0-3 or 4-7 of keys 2p, 2p + 1
  for (int p = 0; p < 4; ++p) {
    const auto* even = reinterpret_cast<const std::uint16_t*>(from + 2 * p * from_stride);
    const auto a = hn::LoadU(d16, even);
    const auto b = hn::LoadU(d16, even + from_stride);
    half[0][p] = hn::BitCast(d32, hn::InterleaveLower(d16, a, b));
    half[1][p] = hn::BitCast(d32, hn::InterleaveUpper(d16, a, b));
  }
  const hn::CappedTag<float, 8> df;
  const hn::Rebind<T, decltype(df)> dt;
  const auto store_pair = [&](auto keys0123, auto keys4567, int dim) HWY_ATTR {
    const auto a = hn::BitCast(d64, keys0123);
    const auto b = hn::BitCast(d64, keys4567);
    float* at = to + dim * kTileColumns;
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(dt, hn::InterleaveLower(d64, a, b))), df, at);
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(dt, hn::InterleaveUpper(d64, a, b))), df,
               at + kTileColumns);
  };
  for (int h = 0; h < 2; ++h) {
    store_pair(hn::InterleaveLower(d32, half[h][0], half[h][1]),
               hn::InterleaveLower(d32, half[h][2], half[h][3]), 4 * h);
    store_pair(hn::InterleaveUpper(d32, half[h][0], half[h][1]),
               hn::InterleaveUpper(d32, half[h][2], half[h][3]), 4 * h + 2);
  }
}

// Keys [count, head_dim] of T to float [kKeyTile / kTileColumns, head_dim, kTileColumns]; keys
// between count and the next multiple of kTileColumns become zero.
template <typename T>
void convert_keys(const T* keys, int count, int head_dim, float* to) {
  const auto column = [&](int key) {
    return to + static_cast<std::ptrdiff_t>(key - key % kTileColumns) * head_dim +
           key % kTileColumns;
  };
  int key = 0;
  for (; key + 8 <= count; key += 8) {
    const T* from = keys + static_cast<std::ptrdiff_t>(key) * head_dim;
    for (int dim = 0; dim < head_dim; dim += 8) {
      transpose_8x8(from + dim, head_dim, column(key) + dim * kTileColumns);
    }
  }
  const hn::CappedTag<float, 1> one;
  for (; key < count || key % kTileColumns != 0; ++key) {
    const T* from = keys + static_cast<std::ptrdiff_t>(key) * head_dim;
    for (int dim = 0; dim < head_dim; ++dim) {
      column(key)[dim * kTileColumns] =
          key < count ? hn::GetLane(load_float(one, from + dim)) : 0.0F;
    }
  }
}

// Values [count, head_dim] of T to float [head_dim / kTileColumns, kKeyTile, kTileColumns].
template <typename T>
void convert_values(const T* values, int count, int head_dim, float* to) {
  const FloatTag d;
  for (int dim = 0; dim < head_dim; dim += kLanes) {
    float* column =
        to + static_cast<std::ptrdiff_t>(dim - dim % kTileColumns) * kKeyTile + dim % kTileColumns;
    for (int key = 0; key < count; ++key) {
      const T* from = values + static_cast<std::ptrdiff_t>(key) * head_dim + dim;
      hn::StoreU(load_float(d, from), d, column + key * kTileColumns);
    }
  }
}

// Where a tile's query rows lie: the heads of one KV head's group, token after token.
struct QueryTile {
  int kv_head;
  int group;
  int first;  // of the args' rows
  int begin;  // position of the args' first row
  int num_heads;
  int head_dim;

  int token(int row) const { return first + row / group; }
  int position(int row) const { return begin + token(row); }
  int head(int row) const { return kv_head * group + row % group; }
  std::ptrdiff_t offset(int row) const {  // in [rows, num_heads, head_dim]
    return (static_cast<std::ptrdiff_t>(token(row)) * num_heads + head(row)) * head_dim;
  }
};

// to [rows, head_dim] = the tile's queries, times factor.
inline void load_queries(const QueryTile& tile, const void* q, int rows, float factor, float* to) {
  for (int row = 0; row < rows; ++row, to += tile.head_dim) {
    const float* from = static_cast<const float*>(q) + tile.offset(row);
    for (int dim = 0; dim < tile.head_dim; ++dim) to[dim] = from[dim] * factor;
  }
}

// scores [rows, kKeyTile] = q [rows, head_dim] x keys, for the first `count` keys at least.
inline void score_rows(const float* q, int rows, int head_dim, const float* keys, int count,
                       float* scores) {
  for (int key = 0; key < count; key += kTileColumns) {
    multiply_columns<kTileColumns>(rows, {q, head_dim},
                                   keys + static_cast<std::ptrdiff_t>(key) * head_dim, head_dim,
                                   {nullptr, 0}, {scores + key, kKeyTile});
  }
}

// How many of the `count` keys from `begin` on a query at `position` sees.
inline int visible_keys(int position, int begin, int count) {
  return std::clamp(position + 1 - begin, 0, count);
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
