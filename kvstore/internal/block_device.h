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

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "common/result.h"
#include "kernels/kv_layout.h"
#include "kvstore/internal/kv_cipher.h"

namespace foretoken::kvstore {

// Memory that operations move from and to: page-aligned, zeros at first. Copies share it: a device
// has one, so that the memory lives as long as an operation may still move to it.
class IoMemory {
 public:
  // Throws Exception(kExhausted).
  explicit IoMemory(std::size_t bytes);

  std::span<std::byte> bytes() const { return {bytes_.get(), count_}; }

 private:
  std::shared_ptr<std::byte> bytes_;
  std::size_t count_;
};

// What is sealed at a time where the file is encrypted (sealing_device.h): a run, the table behind
// runs, a slab. Bytes that were sealed once are written as they are from then on.
struct SealedUnit {
  std::span<std::byte> bytes;
  Seal seal;  // that a read opens, that a write has made
  bool is_sealed = false;
  const kernels::KvShape* slab = nullptr;  // of a slab: it is sealed run by run (sealed_slab.h)
};

enum class IoDirection { kRead, kWrite };

struct IoOperation {
  IoDirection direction = IoDirection::kRead;
  std::uint64_t offset = 0;  // in the file
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::uint64_t tag = 0;       // the caller's name for it
  SealedUnit* unit = nullptr;  // that it moves, or some of it; the device's until the IoDone
};

struct IoDone {
  std::uint64_t tag = 0;
  // Moved; 0 of a read: the file ends before. Error: kExhausted when the file system is full, kIo.
  Result<std::size_t> bytes;
};

class BlockDevice {
 public:
  virtual ~BlockDevice() = default;

  // Starts it; one that can't be started ends with an error, as others do. Its memory stays the
  // device's until its IoDone.
  // REQUIRES: fewer than `depth` operations are in flight.
  virtual void submit(const IoOperation& operation) = 0;
  // What has ended since the last call. Does not wait.
  virtual std::vector<IoDone> completed() = 0;
  // Sets the file's length: zeros are added, what is past it is lost. Blocks.
  virtual Status resize(std::uint64_t bytes) = 0;
  // The file's length. Blocks.
  virtual Result<std::uint64_t> size() const = 0;
  // An eventfd that is readable while completed() has something; completed() clears it.
  virtual int completion_fd() const = 0;
  virtual std::string_view name() const = 0;  // for the log
};

// Destroying a device waits for what is in flight, for kEndLimit at most. What has not ended by
// then keeps its memory, and a thread that sees to it, until it ends. `file` must outlive the
// device.
inline constexpr std::chrono::seconds kEndLimit{1};

// io_uring, with `memory` registered where the limits allow. Error: kUnavailable where the kernel
// has no io_uring, or does not let us.
Result<std::unique_ptr<BlockDevice>> make_uring_device(int file, const IoMemory& memory, int depth);
// pread and pwrite on threads.
std::unique_ptr<BlockDevice> make_thread_device(int file, const IoMemory& memory, int depth);
// The first of the two that works here; says in the log which.
std::unique_ptr<BlockDevice> make_block_device(int file, const IoMemory& memory, int depth);

// For the implementations: `count` as read or write returned it, or -errno.
Result<std::size_t> io_result(std::int64_t count);
Status resize_file(int file, std::uint64_t bytes);
Result<std::uint64_t> size_of_file(int file);
void log_left_behind(std::size_t num_operations);  // when a device ends without them

}  // namespace foretoken::kvstore
