#include "kvstore/internal/arena.h"

#include <fcntl.h>
#include <numa.h>
#include <numaif.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "common/log.h"
#include "common/result.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kRoundBytes = std::size_t{128} << 20;  // so that the first slabs come soon
constexpr int kMaxThreads = 16;  // page faults of one memfd stop scaling about there (guessed)
constexpr int kTouchNice = 10;   // serving goes first

[[noreturn]] void fail(const std::string& what, std::size_t bytes) {
  throw Exception(ErrorCode::kIo, what + " failed for an arena of " + std::to_string(bytes) +
                                      " bytes: " + std::strerror(errno));
}

FileDescriptor make_arena_memory(std::size_t bytes) {
  FileDescriptor memory = make_shared_memory("foretoken-kv", bytes).value_or_throw();
  seal(memory, F_SEAL_SEAL).value_or_throw();
  return memory;
}

}  // namespace

Arena::Arena(const ArenaLayout& layout, NumaPlacement placement, Populate populate)
    : layout_(layout),
      populate_(std::move(populate)),
      memory_(make_arena_memory(layout.arena_bytes())),
      progress_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  const std::size_t bytes = layout_.arena_bytes();
  if (!progress_) fail("eventfd", bytes);
  mapping_ = SharedMapping::map(memory_.get(), 0, bytes).value_or_throw();
  if (placement == NumaPlacement::kSpread) bind_stripes();
  plan_pieces();
  start_touching();
}

Arena::~Arena() {
  threads_.clear();  // stops and joins
}

// Before anything is touched: a page lies where the policy says at its first touch. A node that
// has no room lends from another, since the policy prefers and does not insist.
void Arena::bind_stripes() const {
  const int num_nodes = num_numa_nodes();
  if (num_nodes < 2) return;
  for (int head = 0; head < layout_.num_kv_heads; ++head) {
    const int node = head * num_nodes / layout_.num_kv_heads;
    bitmask* mask = numa_allocate_nodemask();
    numa_bitmask_setbit(mask, static_cast<unsigned>(node));
    if (mbind(mapping_.base() + layout_.stripe_offset(head), layout_.stripe_bytes(), MPOL_PREFERRED,
              mask->maskp, mask->size, 0) != 0) {
      log().warn("stripe {} could not be placed on NUMA node {}: {}", head, node,
                 std::strerror(errno));
    }
    numa_free_nodemask(mask);
  }
}

void Arena::plan_pieces() {
  const std::size_t piece_bytes = kRoundBytes / static_cast<std::size_t>(layout_.num_kv_heads);
  const auto piece_slabs =
      static_cast<std::uint32_t>(std::max<std::size_t>(1, piece_bytes / layout_.slab_bytes));
  for (std::uint32_t slab = 0; slab < layout_.slabs_per_head; slab += piece_slabs) {
    for (int head = 0; head < layout_.num_kv_heads; ++head) {
      pieces_.push_back({head, slab, std::min(slab + piece_slabs, layout_.slabs_per_head)});
    }
  }
}

void Arena::start_touching() {
  const auto processors = static_cast<int>(std::thread::hardware_concurrency());
  const int num_threads = std::clamp(processors / 2, 1, kMaxThreads);
  num_touching_ = num_threads;
  for (int i = 0; i < num_threads; ++i) {
    threads_.emplace_back([this](const std::stop_token& stop) {
      touch_pieces(stop);
      if (num_touching_.fetch_sub(1, std::memory_order_acq_rel) == 1) tell_progress();
    });
  }
}

void Arena::touch_pieces(const std::stop_token& stop) {
  setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kTouchNice);
  while (!stop.stop_requested()) {
    const std::size_t index = next_piece_.fetch_add(1);
    if (index >= pieces_.size()) return;
    if (!touch(pieces_[index])) {
      log().error("the arena stays at {} of {} slabs a head: no memory: {}", num_ready(),
                  layout_.slabs_per_head, std::strerror(errno));
      next_piece_ = pieces_.size();  // for all threads
      return;
    }
    note_touched(pieces_[index]);
  }
}

// Without writing: a rank may be quicker.
bool Arena::touch(const Piece& piece) const {
  std::byte* begin =
      mapping_.base() + layout_.stripe_offset(piece.head) + layout_.slab_bytes * piece.first_slab;
  return populate_(begin, layout_.slab_bytes * (piece.last_slab - piece.first_slab));
}

void Arena::note_touched(Piece& piece) {
  const std::lock_guard lock(mutex_);
  piece.touched = true;
  while (first_untouched_ < pieces_.size() && pieces_[first_untouched_].touched) ++first_untouched_;
  // A round counts when its last stripe is done: the first untouched piece bounds all heads.
  const std::uint32_t ready = first_untouched_ == pieces_.size()
                                  ? layout_.slabs_per_head
                                  : pieces_[first_untouched_].first_slab;
  if (ready == num_ready_) return;
  num_ready_.store(ready, std::memory_order_release);
  tell_progress();
}

void Arena::tell_progress() const {
  const std::uint64_t one = 1;
  if (write(progress_.get(), &one, sizeof one) != sizeof one) log().warn("eventfd is full");
}

void Arena::clear_progress() {
  std::uint64_t count = 0;
  while (read(progress_.get(), &count, sizeof count) == sizeof count) {
  }
}

}  // namespace foretoken::kvstore
