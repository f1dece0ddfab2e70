// BlockDevice on io_uring.
#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "common/check.h"
#include "kvstore/internal/block_device.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {
namespace {

class UringDevice : public BlockDevice {
 public:
  UringDevice(int file, const IoMemory& memory)
      : file_(file), memory_(memory.bytes()), event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  ~UringDevice() override {
    if (!is_open_) return;
    while (num_in_flight_ > 0) {
      io_uring_cqe* entry = nullptr;
      if (io_uring_wait_cqe(&ring_, &entry) == 0) finish(*entry);
    }
    io_uring_queue_exit(&ring_);
  }
  UringDevice(const UringDevice&) = delete;
  UringDevice& operator=(const UringDevice&) = delete;

  Status open(int depth) {
    if (!event_) return refused("eventfd", -errno);
    const int made = io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0);
    if (made < 0) return refused("io_uring", made);
    is_open_ = true;
    const int watched = io_uring_register_eventfd(&ring_, event_.get());
    if (watched < 0) return refused("io_uring's eventfd", watched);
    // Counts against RLIMIT_MEMLOCK. Without it the kernel maps the pages at each operation.
    const iovec region{memory_.data(), memory_.size()};
    is_registered_ = io_uring_register_buffers(&ring_, &region, 1) == 0;
    return Ok{};
  }

  void submit(const IoOperation& operation) override {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    FT_CHECK(entry != nullptr, num_in_flight_);
    prepare(entry, operation);
    io_uring_sqe_set_data64(entry, operation.tag);
    int submitted = 0;
    while ((submitted = io_uring_submit(&ring_)) == -EINTR || submitted == -EAGAIN) {
    }
    FT_CHECK(submitted == 1, submitted);
    ++num_in_flight_;
  }

  std::vector<IoDone> completed() override {
    std::uint64_t count = 0;
    while (read(event_.get(), &count, sizeof count) == sizeof count) {
    }
    std::vector<IoDone> all;
    io_uring_cqe* entry = nullptr;
    while (io_uring_peek_cqe(&ring_, &entry) == 0) all.push_back(finish(*entry));
    return all;
  }

  Status resize(std::uint64_t bytes) override { return resize_file(file_, bytes); }
  int completion_fd() const override { return event_.get(); }
  std::string_view name() const override {
    return is_registered_ ? "io_uring with registered buffers" : "io_uring";
  }

 private:
  static Error refused(const std::string& what, int error) {
    return {ErrorCode::kUnavailable, what + ": " + std::strerror(-error)};
  }

  void prepare(io_uring_sqe* entry, const IoOperation& operation) const {
    const auto bytes = static_cast<unsigned>(operation.bytes);
    const bool reads = operation.direction == IoDirection::kRead;
    if (is_registered_ && reads) {
      io_uring_prep_read_fixed(entry, file_, operation.data, bytes, operation.offset, 0);
    } else if (is_registered_) {
      io_uring_prep_write_fixed(entry, file_, operation.data, bytes, operation.offset, 0);
    } else if (reads) {
      io_uring_prep_read(entry, file_, operation.data, bytes, operation.offset);
    } else {
      io_uring_prep_write(entry, file_, operation.data, bytes, operation.offset);
    }
  }

  IoDone finish(io_uring_cqe& entry) {
    IoDone done{entry.user_data, io_result(entry.res)};
    io_uring_cqe_seen(&ring_, &entry);
    --num_in_flight_;
    return done;
  }

  int file_;
  std::span<std::byte> memory_;
  FileDescriptor event_;
  io_uring ring_{};
  bool is_open_ = false;
  bool is_registered_ = false;
  int num_in_flight_ = 0;
};

}  // namespace

Result<std::unique_ptr<BlockDevice>> make_uring_device(int file, const IoMemory& memory,
                                                       int depth) {
  auto device = std::make_unique<UringDevice>(file, memory);
  FT_RETURN_IF_ERROR(device->open(depth));
  return std::unique_ptr<BlockDevice>(std::move(device));
}

}  // namespace foretoken::kvstore
