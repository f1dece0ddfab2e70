#include "kernels/cpu/simd/elementwise.h"

#include <cmath>
#include <cstdint>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd/elementwise.cc"
#include "kernels/cpu/simd/targets.h"
// Below Highway's choice of targets.
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// Calls body(vector_tag, column) over a row: whole vectors, then single elements. The order of
// sums below is fixed by 8 partial sums, so that AVX2 and AVX-512 agree.
using RowTag = hn::CappedTag<float, 8>;
constexpr int kRowLanes = 8;

template <typename Body>
HWY_INLINE void for_each_vector(int columns, const Body& body) {
  int column = 0;
  for (; column + kRowLanes <= columns; column += kRowLanes) body(RowTag(), column);
  for (; column < columns; ++column) body(hn::CappedTag<float, 1>(), column);
}

void to_float_row(const void* from, DataType type, int columns, float* out) {
  with_type(type, from, [&](const auto* typed) {
    for_each_vector(
        columns, [&](auto d, int i) HWY_ATTR { hn::StoreU(load_float(d, typed + i), d, out + i); });
  });
}

void from_float_row(const float* from, int columns, DataType type, void* out) {
  with_type(type, out, [&](auto* typed) {
    for_each_vector(columns, [&](auto d, int i)
                                 HWY_ATTR { store_float(d, hn::LoadU(d, from + i), typed + i); });
  });
}

void add_row(const float* x, int columns, float* sum) {
  for_each_vector(columns, [&](auto d, int i) HWY_ATTR {
    hn::StoreU(hn::Add(hn::LoadU(d, sum + i), hn::LoadU(d, x + i)), d, sum + i);
  });
}

float sum_of_squares(const float* x, int columns) {
  auto sums = hn::Zero(RowTag());
  float rest = 0;
  for_each_vector(columns, [&](auto d, int i) HWY_ATTR {
    const auto value = hn::LoadU(d, x + i);
    if constexpr (hn::MaxLanes(d) == kRowLanes) {
      sums = hn::MulAdd(value, value, sums);
    } else {
      rest += hn::GetLane(hn::Mul(value, value));
    }
  });
  return rest + hn::GetLane(hn::SumOfLanes(RowTag(), sums));
}

void rms_norm_row(const float* x, const float* weight, float eps, int columns, float* out) {
  const float mean = sum_of_squares(x, columns) / static_cast<float>(columns);
  const float inverse = 1.0F / std::sqrt(mean + eps);
  for_each_vector(columns, [&](auto d, int i) HWY_ATTR {
    const auto normed = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, inverse));
    hn::StoreU(hn::Mul(normed, hn::LoadU(d, weight + i)), d, out + i);
  });
}

// silu(x) = x / (1 + e^-x); by e^-|x| <= 1, so that nothing overflows.
void swiglu_row(const float* gate, const float* up, int columns, float* out) {
  for_each_vector(columns, [&](auto d, int i) HWY_ATTR {
    const auto one = hn::Set(d, 1.0F);
    const auto x = hn::LoadU(d, gate + i);
    const auto e = exp2_of_negative(d, hn::Mul(hn::Abs(x), hn::Set(d, -1.442695041F)));
    const auto numerator = hn::IfThenElse(hn::Ge(x, hn::Zero(d)), one, e);
    const auto silu = hn::Div(hn::Mul(x, numerator), hn::Add(one, e));
    hn::StoreU(hn::Mul(silu, hn::LoadU(d, up + i)), d, out + i);
  });
}

void rotate_row(const float* x, const float* cos, const float* sin, int head_dim, float* out) {
  const int half = head_dim / 2;
  for_each_vector(half, [&](auto d, int i) HWY_ATTR {
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    const auto first = hn::LoadU(d, x + i);
    const auto second = hn::LoadU(d, x + half + i);
    hn::StoreU(hn::Sub(hn::Mul(first, c), hn::Mul(second, s)), d, out + i);
    hn::StoreU(hn::Add(hn::Mul(second, c), hn::Mul(first, s)), d, out + half + i);
  });
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace foretoken::kernels::simd {

HWY_EXPORT(to_float_row);
void to_float(const void* from, DataType type, int columns, float* out) {
  HWY_DYNAMIC_DISPATCH(to_float_row)(from, type, columns, out);
}
HWY_EXPORT(from_float_row);
void from_float(const float* from, int columns, DataType type, void* out) {
  HWY_DYNAMIC_DISPATCH(from_float_row)(from, columns, type, out);
}
HWY_EXPORT(add_row);
void add(const float* x, int columns, float* sum) {
  HWY_DYNAMIC_DISPATCH(add_row)(x, columns, sum);
}
HWY_EXPORT(rms_norm_row);
void rms_norm(const float* x, const float* weight, float eps, int columns, float* out) {
  HWY_DYNAMIC_DISPATCH(rms_norm_row)(x, weight, eps, columns, out);
}
HWY_EXPORT(swiglu_row);
void swiglu(const float* gate, const float* up, int columns, float* out) {
  HWY_DYNAMIC_DISPATCH(swiglu_row)(gate, up, columns, out);
}
HWY_EXPORT(rotate_row);
void rotate(const float* x, const float* cos, const float* sin, int head_dim, float* out) {
  HWY_DYNAMIC_DISPATCH(rotate_row)(x, cos, sin, head_dim, out);
}

}  // namespace foretoken::kernels::simd
#endif  // HWY_ONCE
