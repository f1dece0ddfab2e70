#include "kvstore/internal/stripe_mapping.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/ids.h"
#include "common/result.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kMaxPieceBytes = std::size_t{1} << 30;

}  // namespace

StripeMapping::StripeMapping(int memory_fd, const ArenaLayout& layout, int first_head,
                             int num_heads, kernels::Device& device, const AwaitSlabs& await_slabs)
    : layout_(layout),
      device_(device),
      num_slabs_(layout.slabs_per_head),
      piece_slabs_(static_cast<std::uint32_t>(
          std::max<std::size_t>(1, kMaxPieceBytes / layout.slab_bytes))) {
  map_stripes(memory_fd, first_head, num_heads);
  try {
    register_pieces(await_slabs);
  } catch (...) {
    unregister_pieces();
    throw;
  }
}

StripeMapping::~StripeMapping() { unregister_pieces(); }

void StripeMapping::map_stripes(int memory_fd, int first_head, int num_heads) {
  for (int head = first_head; head < first_head + num_heads; ++head) {
    auto mapping =
        SharedMapping::map(memory_fd, layout_.stripe_offset(head), layout_.stripe_bytes());
    if (!mapping) {
      throw Exception(ErrorCode::kDevice, "mapping the KV arena: " + mapping.error().message +
                                              "; lower --kv-host-gib, or raise `ulimit -v`");
    }
    stripes_.push_back(std::move(*mapping));
  }
}

// All stripes at the same pace, as the store backs them. Where its memory ends, so do they: to
// register more would be to ask for memory that isn't there.
void StripeMapping::register_pieces(const AwaitSlabs& await_slabs) {
  for (std::uint32_t first = 0; first < num_slabs_; first += piece_slabs_) {
    const std::uint32_t wanted = first + std::min(piece_slabs_, num_slabs_ - first);
    const std::uint32_t end = std::min(wanted, await_slabs(wanted));
    if (end < first)
      throw Exception(ErrorCode::kDevice, "the KV store took slabs back that it had");
    if (end < wanted) num_slabs_ = end;
    for (const SharedMapping& stripe : stripes_) {
      if (end == first) break;
      std::byte* host = stripe.base() + layout_.slab_bytes * first;
      pieces_.push_back({host, device_.register_host(host, layout_.slab_bytes * (end - first))});
    }
  }
  if (num_slabs_ == 0) {
    throw Exception(ErrorCode::kDevice,
                    "the machine has no memory left for the KV arena; lower --kv-host-gib");
  }
  if (num_slabs_ == layout_.slabs_per_head) return;
  for (SharedMapping& stripe : stripes_) stripe.cut(layout_.slab_bytes * num_slabs_);
}

void StripeMapping::unregister_pieces() {
  for (const Piece& piece : pieces_) device_.unregister_host(piece.host);
}

std::byte* StripeMapping::slab(int head, SlabIndex slab) const {
  FT_CHECK(raw(slab) < num_slabs_, raw(slab), num_slabs_);
  const auto piece = raw(slab) / piece_slabs_ * stripes_.size() + static_cast<std::size_t>(head);
  return pieces_[piece].device + layout_.slab_bytes * (raw(slab) % piece_slabs_);
}

std::vector<std::span<std::byte>> StripeMapping::memory() const {
  std::vector<std::span<std::byte>> memory;
  for (const SharedMapping& stripe : stripes_) memory.emplace_back(stripe.base(), stripe.bytes());
  return memory;
}

}  // namespace foretoken::kvstore
