#include "kvstore/internal/arena_guard.h"

#include <sys/mman.h>

#include <cerrno>

#include "common/check.h"

namespace foretoken::kvstore {

ArenaGuard::ArenaGuard(std::byte* begin, std::size_t bytes) : begin_(begin), bytes_(bytes) {
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
  FT_CHECK(mprotect(begin_, bytes_, protection) == 0, errno);
}

}  // namespace foretoken::kvstore
