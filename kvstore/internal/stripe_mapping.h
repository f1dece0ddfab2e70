// StripeMapping: a rank's own stripes of the arena, mapped and registered with its device: as much
// of each as there is memory for.
//
// Registered in pieces of whole slabs, at most 1 GiB each: a device may give each piece an address
// of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/device.h"
#include "kvstore/internal/arena_layout.h"
#include "kvstore/internal/host_memory.h"
#include "kvstore/internal/slab_pool.h"

namespace foretoken::kvstore {

class StripeMapping {
 public:
  // Returns once so many slabs of each stripe may be registered; how many may, fewer where there
  // are no more.
  using AwaitSlabs = std::function<std::uint32_t(std::uint32_t wanted)>;

  // Throws Exception(kDevice), or what await_slabs or the device throws.
  StripeMapping(int memory_fd, const ArenaLayout& layout, int first_head, int num_heads,
                kernels::Device& device, const AwaitSlabs& await_slabs);
  ~StripeMapping();
  StripeMapping(const StripeMapping&) = delete;
  StripeMapping& operator=(const StripeMapping&) = delete;

  // Of each stripe.
  std::uint32_t num_slabs() const { return num_slabs_; }

  // Device address of a slab; head counts from first_head.
  std::byte* slab(int head, SlabIndex slab) const;

  // Where this process has it.
  std::byte* host_slab(int head, SlabIndex slab) const {
    return stripes_[static_cast<std::size_t>(head)].base() +
           layout_.slab_bytes * static_cast<std::size_t>(slab);
  }

  // What this process has mapped, by stripe.
  std::vector<std::span<std::byte>> memory() const;

 private:
  struct Piece {
    std::byte* host;
    std::byte* device;
  };
  void map_stripes(int memory_fd, int first_head, int num_heads);
  void register_pieces(const AwaitSlabs& await_slabs);
  void unregister_pieces();

  ArenaLayout layout_;
  kernels::Device& device_;
  std::vector<SharedMapping> stripes_;
  std::uint32_t num_slabs_;
  std::uint32_t piece_slabs_;  // of each piece but a stripe's last
  std::vector<Piece> pieces_;  // [pieces of a stripe, num_heads]
};

}  // namespace foretoken::kvstore
