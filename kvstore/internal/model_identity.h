// ModelIdentity: whose KV a store holds, in memory and on disk.
#pragma once

#include <string>

#include "kernels/kv_layout.h"

namespace foretoken::kvstore {

inline constexpr std::size_t kMaxModelHashBytes = 128;

struct ModelIdentity {
  std::string model_hash;  // at most kMaxModelHashBytes
  int total_kv_heads = 0;
  int num_layers = 0;
  int head_dim = 0;
  kernels::DataType kv_type = kernels::DataType::kFp16;
  bool operator==(const ModelIdentity&) const = default;

  // Of one KV head, which is what a slab holds.
  kernels::KvShape slab_shape() const { return {num_layers, 1, head_dim, kv_type}; }
  std::size_t slab_bytes() const { return slab_shape().slab_bytes(); }
};

}  // namespace foretoken::kvstore
