// Where an entry of a sequence's slot tables and its bytes lie (kernels/kv_layout.h).
#pragma once

#include "kernels/kv_layout.h"

namespace foretoken::kernels {

inline std::size_t head_index(const SequenceKv& kv, int layer, int head) {
  return static_cast<std::size_t>(layer) * static_cast<std::size_t>(kv.shape.num_kv_heads) +
         static_cast<std::size_t>(head);
}
inline std::int32_t& slot_of_block(const SequenceKv& kv, int layer, int head, int block) {
  return kv.block_to_slot[head_index(kv, layer, head) * static_cast<std::size_t>(kv.max_blocks) +
                          static_cast<std::size_t>(block)];
}
inline std::int32_t& block_in_slot(const SequenceKv& kv, int layer, int head, int slot) {
  return kv.slot_to_block[head_index(kv, layer, head) * static_cast<std::size_t>(kv.num_slots) +
                          static_cast<std::size_t>(slot)];
}
inline std::byte* slot_bytes(const SequenceKv& kv, int layer, int head, int slot) {
  return kv.slots + slot_offset(kv, layer, head, slot);
}

}  // namespace foretoken::kernels
