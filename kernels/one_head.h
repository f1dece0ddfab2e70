// One KV head of a sequence as ops that are told of a single KV head see it.
#pragma once

#include <cstddef>

#include "kernels/key_sketch.h"
#include "kernels/kv_layout.h"

namespace foretoken::kernels {

// A view whose head 0 is `head`. Its shape stays that of all heads: the layers' strides go by it.
// Its attention is not observed, as an observed row is of all heads.
inline SequenceKv one_head(SequenceKv kv, int head) {
  kv.slots += slot_offset(kv, 0, head, 0);
  kv.block_to_slot += static_cast<std::ptrdiff_t>(head) * kv.max_blocks;
  kv.slot_to_block += static_cast<std::ptrdiff_t>(head) * kv.num_slots;
  const std::ptrdiff_t segments = static_cast<std::ptrdiff_t>(head) * kv.max_segments;
  if (kv.slabs != nullptr) kv.slabs += segments;
  if (kv.runs != nullptr) {
    kv.runs += segments;
    kv.checksums += segments * kSegmentBlocks;
  }
  if (kv.sketches != nullptr) kv.sketches += sketch_offset(kv, 0, head, 0);
  kv.block_max = nullptr;
  return kv;
}

}  // namespace foretoken::kernels
