#include "kernels/cpu/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <new>

#include "common/check.h"

namespace foretoken::kernels {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPieceBytes = std::size_t{32} << 20;

std::align_val_t alignment_for(std::size_t bytes) {
  return std::align_val_t{bytes >= kHugePage ? kHugePage : kPage};
}

}  // namespace

void* allocate_host(std::size_t bytes) {
  void* data = ::operator new(bytes, alignment_for(bytes));
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // may fail: it is only faster
  return data;
}

void release_host(void* data, std::size_t bytes) { ::operator delete(data, alignment_for(bytes)); }

WeightArena::~WeightArena() {
  for (const Piece& piece : pieces_) release_host(piece.data, piece.bytes);
}

void* WeightArena::allocate(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const std::size_t wanted = (bytes / kPage + 1) * kPage;  // never empty
  if (pieces_.empty() || pieces_.back().bytes - pieces_.back().used < wanted) {
    const std::size_t size = std::max(wanted, kPieceBytes);
    pieces_.push_back({static_cast<std::byte*>(allocate_host(size)), size, 0, 0});
  }
  Piece& piece = pieces_.back();
  void* data = piece.data + piece.used;
  piece.used += wanted;
  ++piece.in_use;
  return data;
}

void WeightArena::release(void* data) {
  const std::lock_guard lock(mutex_);
  const auto piece = std::find_if(pieces_.begin(), pieces_.end(), [&](const Piece& p) {
    return std::less_equal<>()(p.data, data) && std::less<>()(data, p.data + p.bytes);
  });
  FT_CHECK(piece != pieces_.end());
  if (--piece->in_use > 0) return;
  release_host(piece->data, piece->bytes);
  pieces_.erase(piece);
}

}  // namespace foretoken::kernels
