#include "kernels/cpu/thread_pool.h"

#include <chrono>

#include "common/check.h"

namespace foretoken::kernels {
namespace {

// How long a worker spins before it sleeps: longer than the gap between two ops of a layer,
// far shorter than the gap between two steps. Guessed.
constexpr auto kSpin = std::chrono::microseconds(50);

constexpr int kSpinsBeforeYield = 2000;  // about as long

void pause() { __builtin_ia32_pause(); }

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  FT_CHECK(num_threads >= 1, num_threads);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
}

void ThreadPool::parallel_for(int n, const std::function<void(int, int)>& body) {
  if (n <= 0) return;
  if (workers_.empty() || n == 1) {
    for (int i = 0; i < n; ++i) body(i, 0);
    return;
  }
  body_ = &body;
  num_tasks_ = n;
  next_task_.store(0, std::memory_order_relaxed);
  busy_workers_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    // The lock orders this store against a worker that is about to sleep.
    const std::lock_guard lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);  // publishes body_ and num_tasks_
  }
  wake_.notify_all();
  take_tasks(0);
  // Acquire: what the workers wrote is visible to the caller after this.
  for (int spins = 0; busy_workers_.load(std::memory_order_acquire) > 0; ++spins) {
    // A worker that has lost its core to another process needs ours more than we do.
    spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
  }
}

void ThreadPool::take_tasks(int thread) {
  for (;;) {
    const int task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks_) return;
    (*body_)(task, thread);
  }
}

void ThreadPool::work(int thread) {
  std::uint64_t seen = 0;
  for (;;) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (generation_.load(std::memory_order_acquire) == seen && !stopping_) {
      if (std::chrono::steady_clock::now() < deadline) {
        pause();
        continue;
      }
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || generation_.load() != seen; });
    }
    if (stopping_) return;
    seen = generation_.load(std::memory_order_acquire);
    take_tasks(thread);
    busy_workers_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace foretoken::kernels
