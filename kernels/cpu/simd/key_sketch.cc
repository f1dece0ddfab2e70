#include "kernels/cpu/simd/key_sketch.h"

#include <cstdint>

#include "kernels/key_sketch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd/key_sketch.cc"
#include "kernels/cpu/simd/targets.h"
// Below Highway's choice of targets.
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// steps[i] as an fp16.
template <typename D>
HWY_INLINE hn::Vec<D> load_steps(D d, const std::uint8_t* steps) {
  std::uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = half_from_step(steps[i]);
  return load_float(d, reinterpret_cast<const hwy::float16_t*>(halves));
}

template <typename T>
void restore(const std::byte* sketch, int head_dim, T* keys) {
  const FloatTag d;
  const hn::RebindToUnsigned<FloatTag> bits;
  const hn::RebindToSigned<FloatTag> whole;
  const auto* codes = reinterpret_cast<const std::uint32_t*>(sketch);
  const auto* lows = reinterpret_cast<const T*>(sketch + sketch_low_offset(head_dim));
  const auto* steps = reinterpret_cast<const std::uint8_t*>(sketch + sketch_step_offset(head_dim));
  for (int dim = 0; dim < head_dim; dim += kLanes) {
    const auto low = load_float(d, lows + dim);
    const auto step = load_steps(d, steps + dim);
    auto rest = hn::LoadU(bits, codes + dim);
    for (int token = 0; token < kBlockTokens; ++token) {
      const auto level = hn::ConvertTo(d, hn::BitCast(whole, hn::And(rest, hn::Set(bits, 3U))));
      store_float(d, hn::MulAdd(step, level, low), keys + token * head_dim + dim);
      rest = hn::ShiftRight<2>(rest);
    }
  }
}

void restore_any(const std::byte* sketch, int head_dim, DataType kv_type, std::byte* keys) {
  with_kv_type(kv_type, [&](auto element) {
    restore(sketch, head_dim, reinterpret_cast<decltype(element)*>(keys));
  });
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace foretoken::kernels::simd {

HWY_EXPORT(restore_any);
void restore_keys(const std::byte* sketch, int head_dim, DataType kv_type, std::byte* keys) {
  HWY_DYNAMIC_DISPATCH(restore_any)(sketch, head_dim, kv_type, keys);
}

}  // namespace foretoken::kernels::simd
#endif  // HWY_ONCE
