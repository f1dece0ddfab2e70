// Vectors of float, loads and stores of the 16-bit types, and exp2: compiled once a target.
#if defined(FORETOKEN_SIMD_VECTOR_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FORETOKEN_SIMD_VECTOR_INL_H
#undef FORETOKEN_SIMD_VECTOR_INL_H
#else
#define FORETOKEN_SIMD_VECTOR_INL_H
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <type_traits>

#include "kernels/kv_layout.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));

template <typename D>
HWY_INLINE hn::Vec<D> load_float(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <typename D>
HWY_INLINE hn::Vec<D> load_float(D d, const hwy::float16_t* from) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, D>(), from));
}
template <typename D>
HWY_INLINE hn::Vec<D> load_float(D d, const hwy::bfloat16_t* from) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::bfloat16_t, D>(), from));
}

template <typename D>
HWY_INLINE void store_float(D d, hn::Vec<D> value, float* to) {
  hn::StoreU(value, d, to);
}
template <typename D>
HWY_INLINE void store_float(D, hn::Vec<D> value, hwy::float16_t* to) {
  const hn::Rebind<hwy::float16_t, D> half;
  hn::StoreU(hn::DemoteTo(half, value), half, to);
}
// Rounds to nearest even, as PyTorch does; Highway 1.0's own conversion cuts off.
template <typename D>
HWY_INLINE void store_float(D, hn::Vec<D> value, hwy::bfloat16_t* to) {
  const hn::RebindToUnsigned<D> d32;
  const hn::RebindToSigned<D> s32;
  const hn::Rebind<std::uint16_t, D> d16;
  const auto bits = hn::BitCast(d32, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7FFF))));
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(s32, rounded)), d16,
             reinterpret_cast<std::uint16_t*>(to));
}

// 2^x for x <= 0; exactly 0 below 2^-126, and for -inf; NaN stays NaN. Relative error below 2e-7.
template <typename D>
HWY_INLINE hn::Vec<D> exp2_of_negative(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  const auto tiny = hn::Set(d, -126.0F);
  const auto clamped = hn::Max(tiny, x);  // in this order a NaN stays one
  const auto whole = hn::Round(clamped);
  const auto f = hn::Sub(clamped, whole);  // [-1/2, 1/2]
  // 2^f: Cephes, exp2f.c.
  auto p = hn::Set(d, 1.535336188319500e-4F);
  p = hn::MulAdd(p, f, hn::Set(d, 1.339887440266574e-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 9.618437357674640e-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 5.550332471162809e-2F));
  p = hn::MulAdd(p, f, hn::Set(d, 2.402264791363012e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 6.931472028550421e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0F));
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, whole));
  const auto power = hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, tiny), power);
}

// Calls body with data as a pointer to the type's own element, const where data is.
template <typename Void, typename Body>
HWY_INLINE void with_type(DataType type, Void* data, const Body& body) {
  const auto as = [&](auto element) {
    using T = decltype(element);
    body(static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(data));
  };
  switch (type) {
    case DataType::kFp32:
      return as(float{});
    case DataType::kFp16:
      return as(hwy::float16_t{});
    case DataType::kBf16:
      return as(hwy::bfloat16_t{});
  }
}

// Calls body with an element of the KV type, which is never float.
template <typename Body>
HWY_INLINE void with_kv_type(DataType type, const Body& body) {
  if (type == DataType::kFp16) return body(hwy::float16_t{});
  body(hwy::bfloat16_t{});
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
