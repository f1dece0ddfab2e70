#include "kvstore/internal/arena_guard.h"

#include <sys/mman.h>

#include <cerrno>
#include <utility>

#include "common/check.h"

namespace foretoken::kvstore {

ArenaGuard::ArenaGuard(std::vector<std::span<std::byte>> memory) : memory_(std::move(memory)) {
  protect(PROT_NONE);
}

void ArenaGuard::enter() {
  const std::lock_guard lock(mutex_);
  if (num_inside_++ == 0) protect(PROT_READ | PROT_WRITE);
}

void ArenaGuard::leave() {
  const std::lock_guard lock(mutex_);
  if (--num_inside_ == 0) protect(PROT_NONE);
}

void ArenaGuard::protect(int protection) const {
  for (const std::span<std::byte> mapping : memory_) {
    FT_CHECK(mprotect(mapping.data(), mapping.size(), protection) == 0, errno);
  }
}

}  // namespace foretoken::kvstore
