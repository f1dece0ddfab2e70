// BlockDevice on threads: pread and pwrite, where there is no io_uring.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {
namespace {

constexpr int kMaxThreads = 16;  // each does one operation at a time (guessed)

// What the device and its threads share. A thread that is left behind in an operation has it alone.
struct Shared {
  explicit Shared(int in, IoMemory of)
      : file(in), memory(std::move(of)), event(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  const int file;
  const IoMemory memory;
  const FileDescriptor event;
  std::mutex mutex;
  std::condition_variable_any changed;
  std::deque<IoOperation> waiting;  // guarded by mutex
  std::vector<IoDone> ended;        // guarded by mutex
  std::size_t num_moving = 0;       // guarded by mutex
};

// Bytes moved, or -errno.
std::int64_t transfer(int file, const IoOperation& operation) {
  const auto offset = static_cast<off_t>(operation.offset);
  for (;;) {
    const ssize_t count = operation.direction == IoDirection::kRead
                              ? pread(file, operation.data, operation.bytes, offset)
                              : pwrite(file, operation.data, operation.bytes, offset);
    if (count >= 0) return count;
    if (errno != EINTR) return -errno;
  }
}

void work(const std::stop_token& stop, Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (shared.changed.wait(lock, stop, [&] { return !shared.waiting.empty(); })) {
    const IoOperation operation = shared.waiting.front();
    shared.waiting.pop_front();
    ++shared.num_moving;
    lock.unlock();
    const std::int64_t count = transfer(shared.file, operation);
    lock.lock();
    --shared.num_moving;
    shared.ended.push_back({operation.tag, io_result(count)});
    eventfd_write(shared.event.get(), 1);
    shared.changed.notify_all();
  }
}

class ThreadDevice : public BlockDevice {
 public:
  ThreadDevice(int file, const IoMemory& memory, int depth)
      : shared_(std::make_shared<Shared>(file, memory)) {
    if (!shared_->event) throw Exception(ErrorCode::kIo, "no eventfd for the NVMe tier");
    for (int i = 0; i < std::min(depth, kMaxThreads); ++i) {
      threads_.emplace_back(
          [shared = shared_](const std::stop_token& stop) { work(stop, *shared); });
    }
  }
  ~ThreadDevice() override {
    for (auto& thread : threads_) thread.request_stop();
    std::unique_lock lock(shared_->mutex);
    shared_->waiting.clear();
    if (shared_->changed.wait_for(lock, kEndLimit, [this] { return shared_->num_moving == 0; })) {
      return;  // jthreads join
    }
    log_left_behind(shared_->num_moving);
    for (auto& thread : threads_) thread.detach();
  }
  ThreadDevice(const ThreadDevice&) = delete;
  ThreadDevice& operator=(const ThreadDevice&) = delete;

  void submit(const IoOperation& operation) override {
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->waiting.push_back(operation);
    }
    shared_->changed.notify_one();
  }

  std::vector<IoDone> completed() override {
    std::uint64_t count = 0;
    while (read(shared_->event.get(), &count, sizeof count) == sizeof count) {
    }
    const std::lock_guard lock(shared_->mutex);
    return std::exchange(shared_->ended, {});
  }

  Status resize(std::uint64_t bytes) override { return resize_file(shared_->file, bytes); }
  Result<std::uint64_t> size() const override { return size_of_file(shared_->file); }
  int completion_fd() const override { return shared_->event.get(); }
  std::string_view name() const override { return "threads with pread and pwrite"; }

 private:
  std::shared_ptr<Shared> shared_;
  std::vector<std::jthread> threads_;
};

}  // namespace

std::unique_ptr<BlockDevice> make_thread_device(int file, const IoMemory& memory, int depth) {
  return std::make_unique<ThreadDevice>(file, memory, depth);
}

}  // namespace foretoken::kvstore
