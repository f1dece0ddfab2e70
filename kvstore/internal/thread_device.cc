// BlockDevice on threads: pread and pwrite, where there is no io_uring.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {
namespace {

constexpr int kMaxThreads = 16;  // each does one operation at a time (guessed)

class ThreadDevice : public BlockDevice {
 public:
  ThreadDevice(int file, int depth) : file_(file), event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!event_) throw Exception(ErrorCode::kIo, "no eventfd for the NVMe tier");
    for (int i = 0; i < std::min(depth, kMaxThreads); ++i) {
      threads_.emplace_back([this](const std::stop_token& stop) { work(stop); });
    }
  }
  ~ThreadDevice() override {
    for (auto& thread : threads_) thread.request_stop();
    threads_.clear();
  }
  ThreadDevice(const ThreadDevice&) = delete;
  ThreadDevice& operator=(const ThreadDevice&) = delete;

  void submit(const IoOperation& operation) override {
    {
      const std::lock_guard lock(mutex_);
      waiting_.push_back(operation);
    }
    changed_.notify_one();
  }

  std::vector<IoDone> completed() override {
    std::uint64_t count = 0;
    while (read(event_.get(), &count, sizeof count) == sizeof count) {
    }
    const std::lock_guard lock(mutex_);
    return std::exchange(ended_, {});
  }

  Status resize(std::uint64_t bytes) override { return resize_file(file_, bytes); }
  int completion_fd() const override { return event_.get(); }
  std::string_view name() const override { return "threads with pread and pwrite"; }

 private:
  void work(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (changed_.wait(lock, stop, [this] { return !waiting_.empty(); })) {
      const IoOperation operation = waiting_.front();
      waiting_.pop_front();
      lock.unlock();
      const std::int64_t count = transfer(operation);
      lock.lock();
      ended_.push_back({operation.tag, io_result(count)});
      eventfd_write(event_.get(), 1);
    }
  }

  // Bytes moved, or -errno.
  std::int64_t transfer(const IoOperation& operation) const {
    const auto offset = static_cast<off_t>(operation.offset);
    for (;;) {
      const ssize_t count = operation.direction == IoDirection::kRead
                                ? pread(file_, operation.data, operation.bytes, offset)
                                : pwrite(file_, operation.data, operation.bytes, offset);
      if (count >= 0) return count;
      if (errno != EINTR) return -errno;
    }
  }

  int file_;
  FileDescriptor event_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<IoOperation> waiting_;    // guarded by mutex_
  std::vector<IoDone> ended_;          // guarded by mutex_
  std::vector<std::jthread> threads_;  // last: they use all of the above
};

}  // namespace

std::unique_ptr<BlockDevice> make_thread_device(int file, int depth) {
  return std::make_unique<ThreadDevice>(file, depth);
}

}  // namespace foretoken::kvstore
