// BlockDevice: asynchronous reads and writes of one file, past the page cache. The seam of the NVMe
// tier: a test puts a device of its own here, to shorten, fail, delay or lose operations.
//
//   auto device = make_block_device(file, memory, /*depth=*/16);
//   device->submit({IoDirection::kRead, offset, memory.bytes().data(), 4096, /*tag=*/7});
//   ... completion_fd() is readable ...
//   for (IoDone& done : device->completed()) ...
//
// Offsets, sizes and addresses are multiples of 4 KiB (O_DIRECT). Operations end in any order; one
// may move less than it was asked to, as read and write may.
//
// For one thread. Example: tests/kvstore/block_device_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken::kvstore {

// Memory that operations move from and to: page-aligned, zeros at first. Owns it.
class IoMemory {
 public:
  // Throws Exception(kExhausted).
  explicit IoMemory(std::size_t bytes);
  ~IoMemory();
  IoMemory(IoMemory&& other) noexcept;
  IoMemory& operator=(IoMemory&&) = delete;

  std::span<std::byte> bytes() const { return bytes_; }

 private:
  std::span<std::byte> bytes_;
};

enum class IoDirection { kRead, kWrite };

struct IoOperation {
  IoDirection direction = IoDirection::kRead;
  std::uint64_t offset = 0;  // in the file
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::uint64_t tag = 0;  // the caller's name for it
};

struct IoDone {
  std::uint64_t tag = 0;
  // Moved; 0 of a read: the file ends before. Error: kExhausted when the file system is full, kIo.
  Result<std::size_t> bytes;
};

class BlockDevice {
 public:
  virtual ~BlockDevice() = default;

  // Starts it. Its memory stays the device's until its IoDone.
  // REQUIRES: fewer than `depth` operations are in flight.
  virtual void submit(const IoOperation& operation) = 0;
  // What has ended since the last call. Does not wait.
  virtual std::vector<IoDone> completed() = 0;
  // Sets the file's length: zeros are added, what is past it is lost. Blocks.
  virtual Status resize(std::uint64_t bytes) = 0;
  // An eventfd that is readable while completed() has something; completed() clears it.
  virtual int completion_fd() const = 0;
  virtual std::string_view name() const = 0;  // for the log
};

// Destroying a device waits for what is in flight. `file` and `memory` must outlive it.

// io_uring, with `memory` registered where the limits allow. Error: kUnavailable where the kernel
// has no io_uring, or does not let us.
Result<std::unique_ptr<BlockDevice>> make_uring_device(int file, const IoMemory& memory, int depth);
// pread and pwrite on threads.
std::unique_ptr<BlockDevice> make_thread_device(int file, int depth);
// The first of the two that works here; says in the log which.
std::unique_ptr<BlockDevice> make_block_device(int file, const IoMemory& memory, int depth);

// For the implementations: `count` as read or write returned it, or -errno.
Result<std::size_t> io_result(std::int64_t count);
Status resize_file(int file, std::uint64_t bytes);

}  // namespace foretoken::kvstore
