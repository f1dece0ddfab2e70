// One sequence's slot tables and slabs, as device code reaches them (kernels/kv_layout.h).
#pragma once

#include "kernels/kv_layout.h"

namespace foretoken::kernels::cuda {

// A broken REQUIRES that only the device can see: the next wait for the stream throws.
__device__ inline void require(bool holds) {
  if (!holds) __trap();
}

__device__ inline std::size_t head_index(const SequenceKv& kv, int layer, int head) {
  return static_cast<std::size_t>(layer) * kv.shape.num_kv_heads + head;
}
// [max_blocks] and [num_slots] of one (layer, head).
__device__ inline std::int32_t* block_to_slot(const SequenceKv& kv, int layer, int head) {
  return kv.block_to_slot + head_index(kv, layer, head) * kv.max_blocks;
}
__device__ inline std::int32_t* slot_to_block(const SequenceKv& kv, int layer, int head) {
  return kv.slot_to_block + head_index(kv, layer, head) * kv.num_slots;
}
__device__ inline std::uint64_t* checksum_of(const SequenceKv& kv, int layer, int head, int block) {
  return static_cast<std::uint64_t*>(arena_checksum(kv, layer, head, block));
}

}  // namespace foretoken::kernels::cuda
