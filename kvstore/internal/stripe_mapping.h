// StripeMapping: a rank's own stripes of the arena, mapped and registered with its device.
//
// Registered in pieces of whole slabs, at most 1 GiB each: a device may give each piece an address
// of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/device.h"
#include "kvstore/internal/arena_layout.h"
#include "kvstore/internal/host_memory.h"
#include "kvstore/internal/slab_pool.h"

namespace foretoken::kvstore {

class StripeMapping {
 public:
  // Throws Exception(kIo), or what the device throws.
  StripeMapping(int memory_fd, const ArenaLayout& layout, int first_head, int num_heads,
                kernels::Device& device);
  ~StripeMapping();
  StripeMapping(const StripeMapping&) = delete;
  StripeMapping& operator=(const StripeMapping&) = delete;

  // Device address of a slab; head counts from first_head.
  std::byte* slab(int head, SlabIndex slab) const;

  // Where this process has it.
  std::byte* host_slab(int head, SlabIndex slab) const {
    return mapping_.base() + layout_.stripe_offset(head) +
           layout_.slab_bytes * static_cast<std::size_t>(slab);
  }

  std::byte* begin() const { return mapping_.base(); }  // host
  std::size_t bytes() const { return mapping_.bytes(); }
  const ArenaLayout& layout() const { return layout_; }

 private:
  // Pieces of a stripe hold piece_slabs_ slabs each; the last one may hold fewer.
  struct Piece {
    std::byte* host;
    std::byte* device;
  };
  void register_pieces(int num_heads);
  void unregister_pieces();

  ArenaLayout layout_;
  kernels::Device& device_;
  SharedMapping mapping_;
  std::uint32_t piece_slabs_ = 0;
  std::uint32_t pieces_per_head_ = 0;
  std::vector<Piece> pieces_;  // [num_heads, pieces_per_head]
};

}  // namespace foretoken::kvstore
