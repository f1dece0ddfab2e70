// The sketch of a block's keys: what device memory may keep of a block that has left, enough to
// estimate its logits for any query. docs/decisions/004-calibration.md has what else was tried.
//
// Each dim has four levels of its own, evenly from the block's least key to its greatest, and a key
// is 2 bits a dim. (By channel, as keys' outliers are: KIVI, arXiv 2402.02750.)
//
//   sketch   [head_dim] uint32 codes, token t in bits 2t and 2t + 1
//            [head_dim] low, the KV type: the least key
//            [head_dim] uint8 step: bits 7 to 14 of an fp16 (5 exponent and 3 mantissa bits, no
//            sign) 7 * head_dim bytes, 7/64 of the block's
//
// Functions here run on every device, so that all make the same bytes of the same keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_layout.h"

namespace foretoken::kernels {

constexpr std::size_t sketch_bytes(const KvShape& shape) {
  return std::size_t{7} * static_cast<std::size_t>(shape.head_dim);
}
constexpr std::size_t sketch_low_offset(int head_dim) {
  return std::size_t{4} * static_cast<std::size_t>(head_dim);
}
constexpr std::size_t sketch_step_offset(int head_dim) {
  return std::size_t{6} * static_cast<std::size_t>(head_dim);
}

// Where a block's sketch lies in SequenceKv::sketches.
constexpr std::size_t sketch_offset(const SequenceKv& kv, int layer, int head, int block) {
  return ((static_cast<std::size_t>(layer) * static_cast<std::size_t>(kv.shape.num_kv_heads) +
           static_cast<std::size_t>(head)) *
              static_cast<std::size_t>(kv.max_blocks) +
          static_cast<std::size_t>(block)) *
         sketch_bytes(kv.shape);
}

// The step between levels, before and after it is stored: by way of the bits of an fp16.
constexpr float exact_step(float low, float high) { return (high - low) * (1.0F / 3.0F); }
constexpr std::uint8_t step_from_half(std::uint16_t half) {
  constexpr std::uint16_t kGreatest = 0xF7;  // the next one is infinity
  const auto rounded = static_cast<std::uint16_t>((half + 0x40) >> 7);
  return static_cast<std::uint8_t>(rounded < kGreatest ? rounded : kGreatest);
}
constexpr std::uint16_t half_from_step(std::uint8_t step) {
  return static_cast<std::uint16_t>(step << 7);
}

// The level nearest to a key, and what it stands for (rounded to the KV type where it is used).
constexpr std::uint32_t level_of(float key, float low, float step) {
  const float above = key - low;
  return above >= 2.5F * step ? 3U : above >= 1.5F * step ? 2U : above >= 0.5F * step ? 1U : 0U;
}
constexpr float key_of_level(std::uint32_t level, float low, float step) {
  return low + step * static_cast<float>(level);
}

}  // namespace foretoken::kernels
