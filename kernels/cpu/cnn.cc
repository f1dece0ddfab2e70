#include "kernels/cpu/cnn.h"

#include "kernels/cpu/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/cnn.cc"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = simd::HWY_NAMESPACE::FloatTag;
using Vec = simd::HWY_NAMESPACE::FloatVec;
constexpr std::size_t kLanes = simd::HWY_NAMESPACE::kLanes;
static_assert(kLanes <= kMaxLanes);

constexpr int kPoints = CnnFilters::kPoints;
constexpr int kBlock = CnnFilters::kBlock;
constexpr float kSaturation = 8.0F;  // |s| <= about 4 for attention rows; 60 rows of 8 fit int32

// B^T d of F(4, 3), written to every `stride`-th vector.
HWY_INLINE void transform_input(const Vec (&d)[kHiddenColumns], std::size_t stride, float* out) {
  const D tag;
  const Vec four = hn::Set(tag, 4.0F);
  const Vec five = hn::Set(tag, 5.0F);
  const Vec two = hn::Set(tag, 2.0F);
  const Vec even4 = hn::NegMulAdd(four, d[2], d[4]);
  const Vec odd4 = hn::NegMulAdd(four, d[1], d[3]);
  const Vec even1 = hn::Sub(d[4], d[2]);
  const Vec odd1 = hn::Sub(d[3], d[1]);
  hn::Store(hn::MulAdd(four, d[0], hn::NegMulAdd(five, d[2], d[4])), tag, out);
  hn::Store(hn::Add(even4, odd4), tag, out + stride);
  hn::Store(hn::Sub(even4, odd4), tag, out + 2 * stride);
  hn::Store(hn::MulAdd(two, odd1, even1), tag, out + 3 * stride);
  hn::Store(hn::NegMulAdd(two, odd1, even1), tag, out + 4 * stride);
  hn::Store(hn::MulAdd(four, d[1], hn::NegMulAdd(five, d[3], d[5])), tag, out + 5 * stride);
}

// A row of hidden values, relu(conv1), transformed: [point, channel, kRows, lane].
template <int kRows>
struct Hidden {
  alignas(64) float values[kPoints * kChannels1 * kRows * kLanes];

  const float* at(int point, int channel, int row) const {
    return values + static_cast<std::size_t>((point * kChannels1 + channel) * kRows + row) * kLanes;
  }
  float* at(int point, int channel, int row) {
    return const_cast<float*>(static_cast<const Hidden*>(this)->at(point, channel, row));
  }
};

// relu(conv1) of one channel: columns [kHiddenColumns] of a hidden row.
HWY_INLINE void hidden_values(const float (&conv1)[9], float bias, const CnnTile& tile,
                              const CnnSide::Hidden& hidden, Vec (&out)[kHiddenColumns]) {
  const D tag;
  const int rows[3] = {hidden.above, hidden.middle, hidden.below};
  for (Vec& v : out) v = hn::Set(tag, bias);
  for (int ky = 0; ky < 3; ++ky) {
    if (rows[ky] == CnnSide::kOutside) continue;
    const float* row = tile.values + static_cast<std::size_t>(rows[ky] * kTileColumns) * kLanes;
    for (int kx = 0; kx < 3; ++kx) {
      const Vec weight = hn::Set(tag, conv1[ky * 3 + kx]);
      for (int c = 0; c < kHiddenColumns; ++c) {
        const Vec value = hn::Load(tag, row + static_cast<std::size_t>(c + kx) * kLanes);
        out[c] = hn::MulAdd(weight, value, out[c]);
      }
    }
  }
  for (int c = 0; c < kHiddenColumns; ++c) {
    out[c] = hn::Max(out[c], hn::Zero(tag));
    if (tile.at_edge) {
      out[c] = hn::Mul(out[c], hn::Load(tag, tile.inside + static_cast<std::size_t>(c) * kLanes));
    }
  }
}

// Hidden row `slot`, transformed.
template <int kRows>
HWY_NOINLINE void hidden_row(const CnnFilters& filters, const CnnTile& tile,
                             const CnnSide::Hidden& hidden, int slot, Hidden<kRows>* out) {
  const std::size_t point_stride = static_cast<std::size_t>(kChannels1 * kRows) * kLanes;
  for (int channel = 0; channel < kChannels1; ++channel) {
    Vec values[kHiddenColumns];
    hidden_values(filters.conv1[channel], filters.bias1[channel], tile, hidden, values);
    transform_input(values, point_stride, out->at(0, channel, slot));
  }
}

// Products of a block of output channels, before the output transform: [kOutputs, channel, point].
template <int kOutputs>
struct Products {
  alignas(64) float values[kOutputs * kBlock * kPoints * kLanes];
  float* at(int output, int channel, int point) {
    return values +
           static_cast<std::size_t>((output * kBlock + channel) * kPoints + point) * kLanes;
  }
};

// s[output, column, lane] += conv3 * relu(A^T m + bias2), over the block's channels.
template <int kOutputs>
HWY_INLINE void add_block(const CnnFilters& filters, int block, Products<kOutputs>& products,
                          float* s) {
  const D tag;
  const Vec two = hn::Set(tag, 2.0F);
  const Vec four = hn::Set(tag, 4.0F);
  const Vec eight = hn::Set(tag, 8.0F);
  for (int output = 0; output < kOutputs; ++output) {
    float* out = s + static_cast<std::size_t>(output * kSegmentColumns) * kLanes;
    Vec sum[kSegmentColumns];
    for (std::size_t c = 0; c < kSegmentColumns; ++c) sum[c] = hn::Load(tag, out + c * kLanes);
    for (int channel = 0; channel < kBlock; ++channel) {
      const float* m = products.at(output, channel, 0);
      Vec p[kPoints];
      for (std::size_t i = 0; i < kPoints; ++i) p[i] = hn::Load(tag, m + i * kLanes);
      const Vec bias = hn::Set(tag, filters.bias2[block * kBlock + channel]);
      const Vec weight = hn::Set(tag, filters.conv3[block * kBlock + channel]);
      const Vec even1 = hn::Add(p[1], p[2]);
      const Vec odd1 = hn::Sub(p[1], p[2]);
      const Vec even2 = hn::Add(p[3], p[4]);
      const Vec odd2 = hn::Sub(p[3], p[4]);
      const Vec y[kSegmentColumns] = {hn::Add(hn::Add(p[0], even1), even2),
                                      hn::MulAdd(two, odd2, odd1), hn::MulAdd(four, even2, even1),
                                      hn::Add(hn::MulAdd(eight, odd2, odd1), p[5])};
      for (std::size_t c = 0; c < kSegmentColumns; ++c) {
        const Vec activated = hn::Max(hn::Add(y[c], bias), hn::Zero(tag));
        sum[c] = hn::MulAdd(weight, activated, sum[c]);
      }
    }
    for (std::size_t c = 0; c < kSegmentColumns; ++c) hn::Store(sum[c], tag, out + c * kLanes);
  }
}

HWY_INLINE void store_fixed(Vec s, std::int32_t* out) {
  const D tag;
  const hn::RebindToSigned<D> signed_tag;
  const Vec scale = hn::Set(tag, static_cast<float>(1 << kFixedBits));
  const Vec value = hn::Clamp(s, hn::Set(tag, -kSaturation), hn::Set(tag, kSaturation));
  hn::StoreU(hn::NearestInt(hn::Mul(value, scale)), signed_tag, out);
}

HWY_INLINE void store_segments(const float* s, std::int32_t* out) {
  for (std::size_t c = 0; c < kSegmentColumns; ++c) {
    store_fixed(hn::Load(D(), s + c * kLanes), out + c * kLanes);
  }
}

HWY_INLINE void store_sum(const float* a, const float* b, float* out) {
  const D tag;
  for (std::size_t c = 0; c < kSegmentColumns; ++c) {
    hn::Store(hn::Add(hn::Load(tag, a + c * kLanes), hn::Load(tag, b + c * kLanes)), tag,
              out + c * kLanes);
  }
}

// One point of two blocks; each output sums tap rows 1 and 2 over the channels, then tap row 0.
void interior_products(const CnnFilters& f, const Hidden<3>& h, int block, int point,
                       Products<1>* first, Products<1>* second) {
  constexpr int kBoth = 2 * kBlock;  // 8 sums in flight hide the latency of a multiply-add
  const D tag;
  Vec entering[kBoth];
  for (Vec& v : entering) v = hn::Zero(tag);
  for (int i = 0; i < kChannels1; ++i) {
    const Vec h61 = hn::Load(tag, h.at(point, i, 1));
    const Vec h62 = hn::Load(tag, h.at(point, i, 2));
#pragma GCC unroll 8
    for (int o = 0; o < kBoth; ++o) {
      const auto& taps = f.below[block + o / kBlock][point][i];
      entering[o] = hn::MulAdd(hn::Set(tag, taps[0][o % kBlock]), h61, entering[o]);
      entering[o] = hn::MulAdd(hn::Set(tag, taps[1][o % kBlock]), h62, entering[o]);
    }
  }
  for (int i = 0; i < kChannels1; ++i) {
    const Vec h60 = hn::Load(tag, h.at(point, i, 0));
#pragma GCC unroll 8
    for (int o = 0; o < kBoth; ++o) {
      const float tap = f.above[block + o / kBlock][point][i][o % kBlock];
      entering[o] = hn::MulAdd(hn::Set(tag, tap), h60, entering[o]);
    }
  }
  for (int o = 0; o < kBoth; ++o) {
    hn::Store(entering[o], tag, (o < kBlock ? first : second)->at(0, o % kBlock, point));
  }
}

void bottom_products(const CnnFilters& f, const Hidden<4>& h, int block, int point,
                     Products<3>* out) {
  const D tag;
  Vec s61[kBlock];
  Vec s62[kBlock];
  Vec s63[kBlock];
  for (int o = 0; o < kBlock; ++o) s61[o] = s62[o] = s63[o] = hn::Zero(tag);
  for (int i = 0; i < kChannels1; ++i) {
    const Vec h61 = hn::Load(tag, h.at(point, i, 1));
    const Vec h62 = hn::Load(tag, h.at(point, i, 2));
    const Vec h63 = hn::Load(tag, h.at(point, i, 3));
    for (int o = 0; o < kBlock; ++o) {
      const Vec middle = hn::Set(tag, f.below[block][point][i][0][o]);
      s61[o] = hn::MulAdd(middle, h61, s61[o]);
      s62[o] = hn::MulAdd(middle, h62, s62[o]);
      s63[o] = hn::MulAdd(middle, h63, s63[o]);
      const Vec below = hn::Set(tag, f.below[block][point][i][1][o]);
      s61[o] = hn::MulAdd(below, h62, s61[o]);
      s62[o] = hn::MulAdd(below, h63, s62[o]);
    }
  }
  for (int i = 0; i < kChannels1; ++i) {
    const Vec h60 = hn::Load(tag, h.at(point, i, 0));
    const Vec h61 = hn::Load(tag, h.at(point, i, 1));
    const Vec h62 = hn::Load(tag, h.at(point, i, 2));
    for (int o = 0; o < kBlock; ++o) {
      const Vec above = hn::Set(tag, f.above[block][point][i][o]);
      s61[o] = hn::MulAdd(above, h60, s61[o]);
      s62[o] = hn::MulAdd(above, h61, s62[o]);
      s63[o] = hn::MulAdd(above, h62, s63[o]);
    }
  }
  for (int o = 0; o < kBlock; ++o) {
    hn::Store(s61[o], tag, out->at(0, o, point));
    hn::Store(s62[o], tag, out->at(1, o, point));
    hn::Store(s63[o], tag, out->at(2, o, point));
  }
}

// Hidden rows: 0 with row -1 in the window, 0 at the window's edge, 1, 2.
void top_products(const CnnFilters& f, const Hidden<4>& h, int block, int point, Products<3>* out) {
  const D tag;
  Vec s1[kBlock];
  Vec s0[kBlock];
  Vec leaving[kBlock];
  for (int o = 0; o < kBlock; ++o) s1[o] = s0[o] = hn::Zero(tag);
  for (int i = 0; i < kChannels1; ++i) {
    const Vec h0 = hn::Load(tag, h.at(point, i, 1));
    const Vec h1 = hn::Load(tag, h.at(point, i, 2));
    const Vec h2 = hn::Load(tag, h.at(point, i, 3));
    for (int o = 0; o < kBlock; ++o) {
      const Vec middle = hn::Set(tag, f.below[block][point][i][0][o]);
      s1[o] = hn::MulAdd(middle, h1, s1[o]);
      s0[o] = hn::MulAdd(middle, h0, s0[o]);
      const Vec below = hn::Set(tag, f.below[block][point][i][1][o]);
      s1[o] = hn::MulAdd(below, h2, s1[o]);
      s0[o] = hn::MulAdd(below, h1, s0[o]);
    }
  }
  for (int o = 0; o < kBlock; ++o) leaving[o] = s1[o];
  for (int i = 0; i < kChannels1; ++i) {
    const Vec before = hn::Load(tag, h.at(point, i, 0));
    const Vec edge = hn::Load(tag, h.at(point, i, 1));
    for (int o = 0; o < kBlock; ++o) {
      const Vec above = hn::Set(tag, f.above[block][point][i][o]);
      leaving[o] = hn::MulAdd(above, before, leaving[o]);
      s1[o] = hn::MulAdd(above, edge, s1[o]);
    }
  }
  for (int o = 0; o < kBlock; ++o) {
    hn::Store(leaving[o], tag, out->at(0, o, point));
    hn::Store(s1[o], tag, out->at(1, o, point));
    hn::Store(s0[o], tag, out->at(2, o, point));
  }
}

void interior(const CnnFilters& filters, const CnnTile& tile, CnnInterior* out) {
  Hidden<3> hidden;
  for (int row = 0; row < 3; ++row) {
    hidden_row(filters, tile, kBottomSide.hidden[row], row, &hidden);
  }
  alignas(64) float s[kSegmentColumns * kLanes] = {};
  Products<1> first;
  Products<1> second;
  for (int block = 0; block < CnnFilters::kBlocks; block += 2) {
    for (int point = 0; point < kPoints; ++point) {
      interior_products(filters, hidden, block, point, &first, &second);
    }
    add_block(filters, block, first, s);
    add_block(filters, block + 1, second, s);
  }
  store_segments(s, out->fixed);
}

// What bottom and top share: s of three rows, of which the first is interior.
template <typename MakeProducts>
HWY_INLINE void edge(const CnnFilters& filters, const CnnSide& side, const CnnTile& tile,
                     const MakeProducts& make_products, CnnEdge* out) {
  Hidden<4> hidden;
  for (int row = 0; row < 4; ++row) hidden_row(filters, tile, side.hidden[row], row, &hidden);
  alignas(64) float s[3 * kSegmentColumns * kLanes] = {};
  Products<3> products;
  for (int block = 0; block < CnnFilters::kBlocks; ++block) {
    for (int point = 0; point < kPoints; ++point) {
      make_products(filters, hidden, block, point, &products);
    }
    add_block(filters, block, products, s);
  }
  const std::size_t row = kSegmentColumns * kLanes;
  store_segments(s, out->interior.fixed);
  store_sum(s + row, s + 2 * row, out->boundary);
}

void bottom(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out) {
  edge(filters, kBottomSide, tile, bottom_products, out);
}

void top(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out) {
  edge(filters, kTopSide, tile, top_products, out);
}

// The few hidden channels of a tile: [channel, hidden row, column, lane].
struct FewHidden {
  alignas(64) float values[CnnFolded::kFew * CnnFolded::kHiddenRows * kHiddenColumns * kLanes];
  float* at(int channel, int row, int column) {
    const int index = (channel * CnnFolded::kHiddenRows + row) * kHiddenColumns + column;
    return values + static_cast<std::size_t>(index) * kLanes;
  }
};

// One output of a folded network, added to s [kSegmentColumns, lane].
HWY_INLINE void add_output(const CnnFolded& folded, const CnnFolded::Output& output,
                           const CnnTile& tile, FewHidden& hidden, float* s) {
  const D tag;
  Vec sum[kSegmentColumns];
  for (Vec& v : sum) v = hn::Set(tag, output.at_zero);
  for (int r = 0; r < kTileRows; ++r) {
    const float* row = tile.values + static_cast<std::size_t>(r * kTileColumns) * kLanes;
    for (std::size_t x = 0; x < 5; ++x) {
      const Vec tap = hn::Set(tag, output.history[static_cast<std::size_t>(r) * 5 + x]);
      for (std::size_t c = 0; c < kSegmentColumns; ++c) {
        sum[c] = hn::MulAdd(tap, hn::Load(tag, row + (c + x) * kLanes), sum[c]);
      }
    }
  }
  for (int i = 0; i < folded.num_hidden; ++i) {
    for (int r = 0; r < CnnFolded::kHiddenRows; ++r) {
      const float* row = hidden.at(i, r, 0);
      for (std::size_t x = 0; x < 3; ++x) {
        const Vec tap = hn::Set(tag, output.hidden[i][r][x]);
        for (std::size_t c = 0; c < kSegmentColumns; ++c) {
          sum[c] = hn::MulAdd(tap, hn::Load(tag, row + (c + x) * kLanes), sum[c]);
        }
      }
    }
  }
  const Vec weight = hn::Set(tag, output.weight);
  for (std::size_t c = 0; c < kSegmentColumns; ++c) {
    const Vec value = output.relu ? hn::Max(sum[c], hn::Zero(tag)) : sum[c];
    hn::Store(hn::MulAdd(weight, value, hn::Load(tag, s + c * kLanes)), tag, s + c * kLanes);
  }
}

void warm(const CnnFolded& folded, const CnnSide& side, const CnnTile& tile, CnnEdge* out) {
  FewHidden hidden;
  for (int i = 0; i < folded.num_hidden; ++i) {
    for (int r = 0; r < CnnFolded::kHiddenRows; ++r) {
      Vec values[kHiddenColumns];
      hidden_values(folded.conv1[i], folded.bias1[i], tile, side.hidden[r], values);
      for (int c = 0; c < kHiddenColumns; ++c) hn::Store(values[c], D(), hidden.at(i, r, c));
    }
  }
  alignas(64) float interior_s[kSegmentColumns * kLanes] = {};
  alignas(64) float boundary_s[kSegmentColumns * kLanes] = {};
  for (int o = 0; o < folded.num_outputs; ++o) {
    const CnnFolded::Output& output = folded.outputs[o];
    add_output(folded, output, tile, hidden, output.interior ? interior_s : boundary_s);
  }
  store_segments(interior_s, out->interior.fixed);
  for (std::size_t i = 0; i < kSegmentColumns * kLanes; ++i) out->boundary[i] = boundary_s[i];
}

void cold(const CnnFolded& folded, const float* rows, int stride, int columns, std::int32_t* fixed,
          float* boundary, float* greatest) {
  const D tag;
  const CnnFolded::Output& interior_map = folded.outputs[0];
  const CnnFolded::Output& boundary_map = folded.outputs[1];
  constexpr int kStep = static_cast<int>(kLanes);
  for (int c = 0; c < columns; c += kStep) {
    Vec inner = hn::Set(tag, interior_map.at_zero);
    Vec outer = hn::Set(tag, boundary_map.at_zero);
    for (int r = 0; r < kTileRows; ++r) {
      for (int x = 0; x < 5; ++x) {
        const Vec value = hn::LoadU(tag, rows + r * stride + c + x);
        inner = hn::MulAdd(hn::Set(tag, interior_map.history[r * 5 + x]), value, inner);
        outer = hn::MulAdd(hn::Set(tag, boundary_map.history[r * 5 + x]), value, outer);
      }
    }
    store_fixed(inner, fixed + c);
    hn::StoreU(outer, tag, boundary + c);
  }
  for (int c = 0; c < columns + kTileColumns - kSegmentColumns; c += kStep) {
    Vec most = hn::LoadU(tag, rows + c);
    for (int r = 1; r < kTileRows; ++r) most = hn::Max(most, hn::LoadU(tag, rows + r * stride + c));
    hn::StoreU(most, tag, greatest + c);
  }
}

int num_lanes() { return static_cast<int>(kLanes); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace foretoken::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace foretoken::kernels {
namespace {

HWY_EXPORT(num_lanes);
HWY_EXPORT(cold);
HWY_EXPORT(warm);
HWY_EXPORT(interior);
HWY_EXPORT(bottom);
HWY_EXPORT(top);

}  // namespace

int cnn_lanes() {
  static const int lanes = HWY_DYNAMIC_DISPATCH(num_lanes)();
  return lanes;
}
void cnn_cold(const CnnFolded& cold_map, const float* rows, int stride, int columns,
              std::int32_t* fixed, float* boundary, float* greatest) {
  HWY_DYNAMIC_DISPATCH(cold)(cold_map, rows, stride, columns, fixed, boundary, greatest);
}
void cnn_warm(const CnnFolded& warm_map, const CnnSide& side, const CnnTile& tile, CnnEdge* out) {
  HWY_DYNAMIC_DISPATCH(warm)(warm_map, side, tile, out);
}
void cnn_interior(const CnnFilters& filters, const CnnTile& tile, CnnInterior* out) {
  HWY_DYNAMIC_DISPATCH(interior)(filters, tile, out);
}
void cnn_bottom(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out) {
  HWY_DYNAMIC_DISPATCH(bottom)(filters, tile, out);
}
void cnn_top(const CnnFilters& filters, const CnnTile& tile, CnnEdge* out) {
  HWY_DYNAMIC_DISPATCH(top)(filters, tile, out);
}

}  // namespace foretoken::kernels
#endif  // HWY_ONCE
