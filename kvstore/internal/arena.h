// Arena: the node's KV memory: a sealed memfd (it can neither shrink nor grow, so no rank's mapping
// can be cut off), pre-faulted in the background, its stripes spread over the NUMA nodes.
//
// Owns the memory, its mapping and the pre-faulting threads. Pieces of all stripes are touched in
// turn, 128 MiB a round, so that every head's slabs become ready at the same pace; admission
// follows num_ready(). Where memory runs out, the slabs that are ready by then are all.
// Thread-safe. Example: tests/kvstore/host_memory_test.cc
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kvstore/internal/arena_layout.h"
#include "kvstore/internal/file_descriptor.h"
#include "kvstore/internal/host_memory.h"

namespace foretoken::kvstore {

enum class NumaPlacement { kNone, kSpread };  // kSpread: stripe h of H on node h * nodes / H

class Arena {
 public:
  using Populate = std::function<bool(std::byte* begin, std::size_t bytes)>;  // host_memory.h's

  // Throws Exception(kIo, kExhausted): what was wanted, what there is.
  Arena(const ArenaLayout& layout, NumaPlacement placement, Populate populate = kvstore::populate);
  ~Arena();  // waits for the piece that is being touched
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  const ArenaLayout& layout() const { return layout_; }
  std::byte* slab(int head, std::uint32_t slab) const {
    return mapping_.base() + layout_.stripe_offset(head) + layout_.slab_bytes * slab;
  }
  int memory_fd() const { return memory_.get(); }
  // Readable (eventfd) when num_ready() has grown, or is settled, since clear_progress().
  int progress_fd() const { return progress_.get(); }
  void clear_progress();
  // Slabs [0, num_ready()) of every stripe are backed by memory.
  std::uint32_t num_ready() const { return num_ready_.load(std::memory_order_acquire); }
  // No more become ready. Acquires what num_ready() is from then on.
  bool is_settled() const { return num_touching_.load(std::memory_order_acquire) == 0; }

 private:
  struct Piece {
    int head;
    std::uint32_t first_slab;
    std::uint32_t last_slab;  // one past
    bool touched = false;     // guarded by mutex_
  };
  void bind_stripes() const;
  void plan_pieces();
  void start_touching();
  void tell_progress() const;
  void touch_pieces(const std::stop_token& stop);
  bool touch(const Piece& piece) const;
  void note_touched(Piece& piece);

  ArenaLayout layout_;
  Populate populate_;
  FileDescriptor memory_;
  FileDescriptor progress_;
  SharedMapping mapping_;
  std::vector<Piece> pieces_;  // by round, then head
  std::atomic<std::size_t> next_piece_{0};
  std::mutex mutex_;
  std::size_t first_untouched_ = 0;  // guarded by mutex_
  std::atomic<std::uint32_t> num_ready_{0};
  std::atomic<int> num_touching_{0};   // threads
  std::vector<std::jthread> threads_;  // last: they use all of the above
};

}  // namespace foretoken::kvstore
