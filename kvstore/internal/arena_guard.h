// ArenaGuard: proves that nothing but KvStore's ops touches the arena: its mappings are PROT_NONE
// while no op is inside, so that any other access ends the process at once. A test aid; without
// it an op costs nothing more.
//
// Thread-safe: ops of several streams may be inside together.
#pragma once

#include <cstddef>
#include <mutex>
#include <span>
#include <vector>

namespace foretoken::kvstore {

class ArenaGuard {
 public:
  // Closes these mappings, of whole pages each.
  explicit ArenaGuard(std::vector<std::span<std::byte>> memory);

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

  std::vector<std::span<std::byte>> memory_;
  std::mutex mutex_;
  int num_inside_ = 0;  // guarded by mutex_
};

}  // namespace foretoken::kvstore
