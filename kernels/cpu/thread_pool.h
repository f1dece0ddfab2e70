// ThreadPool: the CPU device's compute units. One caller at a time; the caller works too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace foretoken::kernels {

// parallel_for splits [0, n) among num_threads threads. Workers spin for a short while between
// calls, since a layer calls many times in a row, then sleep: an idle pool costs nothing.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i, thread) for every i in [0, n), in any order; thread < num_threads(). Tasks are
  // taken one at a time, so uneven ones balance. Returns when all are done.
  void parallel_for(int n, const std::function<void(int i, int thread)>& body);

 private:
  void work(int thread);
  void take_tasks(int thread);

  std::vector<std::jthread> workers_;
  const std::function<void(int, int)>* body_ = nullptr;  // published by generation_
  int num_tasks_ = 0;
  std::atomic<int> next_task_{0};
  std::atomic<int> busy_workers_{0};
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;  // guards sleeping on wake_
  std::condition_variable wake_;
};

}  // namespace foretoken::kernels
