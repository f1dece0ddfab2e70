// ArenaGuard: proves that nothing but KvStore's ops touches the arena: the mapping is PROT_NONE
// while no op is inside, so that any other access ends the process at once. A test aid; without
// it an op costs nothing more.
//
// Thread-safe: ops of several streams may be inside together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace foretoken::kvstore {

class ArenaGuard {
 public:
  // Closes [begin, begin + bytes), a mapping of whole pages.
  ArenaGuard(std::byte* begin, std::size_t bytes);

  // Open while it lives.
  class Scope {
   public:
    explicit Scope(ArenaGuard& guard) : guard_(guard) { guard_.enter(); }
    ~Scope() { guard_.leave(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    ArenaGuard& guard_;
  };

 private:
  void enter();
  void leave();
  void protect(int protection) const;

  std::byte* begin_;
  std::size_t bytes_;
  std::mutex mutex_;
  int num_inside_ = 0;  // guarded by mutex_
};

}  // namespace foretoken::kvstore
