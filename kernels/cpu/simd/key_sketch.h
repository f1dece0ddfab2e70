// The keys that a sketch stands for (kernels/key_sketch.h).
#pragma once

#include <cstddef>

#include "kernels/kv_layout.h"

namespace foretoken::kernels::simd {

// keys: [16, head_dim] KV type. REQUIRES: head_dim is a multiple of 32.
void restore_keys(const std::byte* sketch, int head_dim, DataType kv_type, std::byte* keys);

}  // namespace foretoken::kernels::simd
