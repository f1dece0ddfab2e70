// BlockDevice on io_uring.
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <iterator>
#include <string>
#include <thread>
#include <utility>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {
namespace {

constexpr int kMaxSubmits = 3;  // while the kernel has no memory for it (guessed) ...
constexpr std::chrono::milliseconds kSubmitPause{1};  // ... from one to the next
constexpr std::uint64_t kNothing = UINT64_MAX;        // the tag of what was taken back

Error refused(const std::string& what, int error) {
  return {ErrorCode::kUnavailable, what + ": " + std::strerror(-error)};
}

// The ring, and all that the kernel may still use when the device has ended.
class Ring {
 public:
  explicit Ring(IoMemory memory)
      : memory_(std::move(memory)), event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~Ring() {
    if (is_open_) io_uring_queue_exit(&ring_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  Status open(int depth) {
    if (!event_) return refused("eventfd", -errno);
    const int made = io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0);
    if (made < 0) return refused("io_uring", made);
    is_open_ = true;
    const int watched = io_uring_register_eventfd(&ring_, event_.get());
    if (watched < 0) return refused("io_uring's eventfd", watched);
    // Counts against RLIMIT_MEMLOCK. Without it the kernel maps the pages at each operation.
    const iovec region{memory_.bytes().data(), memory_.bytes().size()};
    is_registered_ = io_uring_register_buffers(&ring_, &region, 1) == 0;
    return Ok{};
  }

  // Error: the kernel does not take it.
  Status start(int file, const IoOperation& operation) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    if (entry == nullptr) {  // full of what was taken back
      io_uring_submit(&ring_);
      entry = io_uring_get_sqe(&ring_);
    }
    if (entry == nullptr) return Error{ErrorCode::kIo, "io_uring takes nothing"};
    prepare(entry, file, operation);
    io_uring_sqe_set_data64(entry, operation.tag);
    int submitted = io_uring_submit(&ring_);
    for (int i = 1; i < kMaxSubmits && io_uring_sq_ready(&ring_) > 0; ++i) {
      std::this_thread::sleep_for(kSubmitPause);
      submitted = io_uring_submit(&ring_);
    }
    if (io_uring_sq_ready(&ring_) == 0) {
      ++num_in_flight_;
      return Ok{};
    }
    // The kernel has not looked at it: it goes with a later one, as one that does nothing.
    io_uring_prep_nop(entry);
    io_uring_sqe_set_data64(entry, kNothing);
    return Error{ErrorCode::kIo, std::string("io_uring: ") + std::strerror(-submitted)};
  }

  // What has ended. Does not wait.
  std::vector<IoDone> take() {
    std::uint64_t count = 0;
    while (read(event_.get(), &count, sizeof count) == sizeof count) {
    }
    std::vector<IoDone> all;
    io_uring_cqe* entry = nullptr;
    while (io_uring_peek_cqe(&ring_, &entry) == 0) {
      if (entry->user_data != kNothing) {
        all.push_back({entry->user_data, io_result(entry->res)});
        --num_in_flight_;
      }
      io_uring_cqe_seen(&ring_, entry);
    }
    return all;
  }

  // Until all has ended; the time may be negative: for ever.
  void drain(std::chrono::milliseconds patience) {
    const auto end = std::chrono::steady_clock::now() + patience;
    while (num_in_flight_ > 0) {
      if (!take().empty()) continue;
      const auto left =
          std::chrono::ceil<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
      if (patience.count() >= 0 && left.count() <= 0) return;
      pollfd ready{event_.get(), POLLIN, 0};
      poll(&ready, 1, patience.count() < 0 ? -1 : static_cast<int>(left.count()));
    }
  }

  int event() const { return event_.get(); }
  bool is_registered() const { return is_registered_; }
  int num_in_flight() const { return num_in_flight_; }

 private:
  void prepare(io_uring_sqe* entry, int file, const IoOperation& operation) const {
    const auto bytes = static_cast<unsigned>(operation.bytes);
    const bool reads = operation.direction == IoDirection::kRead;
    if (is_registered_ && reads) {
      io_uring_prep_read_fixed(entry, file, operation.data, bytes, operation.offset, 0);
    } else if (is_registered_) {
      io_uring_prep_write_fixed(entry, file, operation.data, bytes, operation.offset, 0);
    } else if (reads) {
      io_uring_prep_read(entry, file, operation.data, bytes, operation.offset);
    } else {
      io_uring_prep_write(entry, file, operation.data, bytes, operation.offset);
    }
  }

  const IoMemory memory_;
  const FileDescriptor event_;
  io_uring ring_{};
  bool is_open_ = false;
  bool is_registered_ = false;
  int num_in_flight_ = 0;
};

class UringDevice : public BlockDevice {
 public:
  UringDevice(int file, std::unique_ptr<Ring> ring) : file_(file), ring_(std::move(ring)) {}
  ~UringDevice() override {
    ring_->drain(kEndLimit);
    if (ring_->num_in_flight() == 0) return;
    log_left_behind(static_cast<std::size_t>(ring_->num_in_flight()));
    std::thread([ring = std::move(ring_)] { ring->drain(std::chrono::milliseconds(-1)); }).detach();
  }
  UringDevice(const UringDevice&) = delete;
  UringDevice& operator=(const UringDevice&) = delete;

  void submit(const IoOperation& operation) override {
    const Status started = ring_->start(file_, operation);
    if (started) return;
    refused_.push_back({operation.tag, started.error()});
    eventfd_write(ring_->event(), 1);
  }

  std::vector<IoDone> completed() override {
    std::vector<IoDone> all = ring_->take();
    std::ranges::move(std::exchange(refused_, {}), std::back_inserter(all));
    return all;
  }

  Status resize(std::uint64_t bytes) override { return resize_file(file_, bytes); }
  Result<std::uint64_t> size() const override { return size_of_file(file_); }
  int completion_fd() const override { return ring_->event(); }
  std::string_view name() const override {
    return ring_->is_registered() ? "io_uring with registered buffers" : "io_uring";
  }

 private:
  int file_;
  std::unique_ptr<Ring> ring_;
  std::vector<IoDone> refused_;  // ended before they began
};

}  // namespace

Result<std::unique_ptr<BlockDevice>> make_uring_device(int file, const IoMemory& memory,
                                                       int depth) {
  auto ring = std::make_unique<Ring>(memory);
  FT_RETURN_IF_ERROR(ring->open(depth));
  return std::unique_ptr<BlockDevice>(std::make_unique<UringDevice>(file, std::move(ring)));
}

}  // namespace foretoken::kvstore
