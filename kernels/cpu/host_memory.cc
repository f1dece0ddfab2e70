#include "kernels/cpu/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>

#include "common/check.h"

namespace foretoken::kernels {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPieceBytes = std::size_t{32} << 20;

// What is larger is mapped by itself, and is the kernel's again when it is released: a heap keeps
// what lies below its end, and grew to more than twice the device's memory as sequences of many
// lengths came and went.
constexpr std::size_t kMostOfHeap = std::size_t{128} << 10;

std::size_t whole_pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Over-maps, and gives back what stands before and behind.
void* map_aligned(std::size_t bytes, std::size_t alignment) {
  const std::size_t spare = alignment - kPage;
  void* mapped =
      mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<std::byte*>(mapped);
  const std::size_t before =
      (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
  if (before > 0) munmap(begin, before);
  if (spare > before) munmap(begin + before + bytes, spare - before);
  return begin + before;
}

}  // namespace

void* allocate_host(std::size_t bytes) {
  if (bytes <= kMostOfHeap) return ::operator new (bytes, std::align_val_t{kPage});
  if (bytes < kHugePage) return map_aligned(whole_pages(bytes), kPage);
  void* data = map_aligned(whole_pages(bytes), kHugePage);
  madvise(data, bytes, MADV_HUGEPAGE);  // may fail: it is only faster
  return data;
}

void release_host(void* data, std::size_t bytes) {
  if (bytes <= kMostOfHeap) return ::operator delete (data, std::align_val_t{kPage});
  munmap(data, whole_pages(bytes));
}

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
