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
                             int num_heads, kernels::Device& device)
    : layout_(layout), device_(device) {
  auto mapping = SharedMapping::map(memory_fd, layout.stripe_offset(first_head),
                                    layout.stripe_bytes() * static_cast<std::size_t>(num_heads));
  if (!mapping) {
    throw Exception(ErrorCode::kDevice, "mapping the KV arena: " + mapping.error().message +
                                            "; lower --kv-host-gib, or raise `ulimit -v`");
  }
  mapping_ = std::move(*mapping);
  try {
    register_pieces(num_heads);
  } catch (...) {
    unregister_pieces();
    throw;
  }
}

StripeMapping::~StripeMapping() { unregister_pieces(); }

void StripeMapping::register_pieces(int num_heads) {
  piece_slabs_ =
      static_cast<std::uint32_t>(std::max<std::size_t>(1, kMaxPieceBytes / layout_.slab_bytes));
  pieces_per_head_ = (layout_.slabs_per_head + piece_slabs_ - 1) / piece_slabs_;
  for (int head = 0; head < num_heads; ++head) {
    std::byte* stripe = mapping_.base() + layout_.stripe_offset(head);
    for (std::uint32_t slab = 0; slab < layout_.slabs_per_head; slab += piece_slabs_) {
      std::byte* host = stripe + layout_.slab_bytes * slab;
      const std::uint32_t count = std::min(piece_slabs_, layout_.slabs_per_head - slab);
      pieces_.push_back({host, device_.register_host(host, layout_.slab_bytes * count)});
    }
  }
}

void StripeMapping::unregister_pieces() {
  for (const Piece& piece : pieces_) device_.unregister_host(piece.host);
}

std::byte* StripeMapping::slab(int head, SlabIndex slab) const {
  FT_CHECK(raw(slab) < layout_.slabs_per_head, raw(slab), layout_.slabs_per_head);
  const auto piece = static_cast<std::size_t>(head) * pieces_per_head_ + raw(slab) / piece_slabs_;
  return pieces_[piece].device + layout_.slab_bytes * (raw(slab) % piece_slabs_);
}

}  // namespace foretoken::kvstore
