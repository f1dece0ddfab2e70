// ArenaLayout: where a slab lies in the arena: the one formula that store and ranks share.
//
//   arena    [num_kv_heads] stripes, each starting on a 2 MiB boundary (huge pages, mbind)
//   stripe   [slabs_per_head] slabs of slab_bytes (kernels/kv_layout.h says what is in one)
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace foretoken::kvstore {

inline constexpr std::size_t kStripeAlignment = std::size_t{2} << 20;

struct ArenaLayout {
  int num_kv_heads = 0;
  std::size_t slab_bytes = 0;
  std::uint32_t slabs_per_head = 0;

  // As many slabs a head as fit arena_bytes; 0 if not even one does.
  static ArenaLayout fit(std::size_t arena_bytes, int num_kv_heads, std::size_t slab_bytes) {
    const std::size_t stripe =
        arena_bytes / static_cast<std::size_t>(num_kv_heads) / kStripeAlignment * kStripeAlignment;
    const std::size_t slabs = std::min<std::size_t>(stripe / slab_bytes, UINT32_MAX);
    return {num_kv_heads, slab_bytes, static_cast<std::uint32_t>(slabs)};
  }

  std::size_t stripe_bytes() const {
    const std::size_t used = slab_bytes * slabs_per_head;
    return (used + kStripeAlignment - 1) / kStripeAlignment * kStripeAlignment;
  }
  std::size_t arena_bytes() const {
    return stripe_bytes() * static_cast<std::size_t>(num_kv_heads);
  }
  std::size_t stripe_offset(int head) const {
    return stripe_bytes() * static_cast<std::size_t>(head);
  }
};

}  // namespace foretoken::kvstore
