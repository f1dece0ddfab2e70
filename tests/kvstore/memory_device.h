// MemoryDevice: a BlockDevice in memory that a test can damage: shorten, fail, hold back or lose
// operations, and change what is stored. FileBytes outlives the device, as a disk outlives a crash.
#pragma once

#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

using FileBytes = std::vector<std::byte>;

// What shall become of an operation.
enum class IoFault {
  kNone,
  kShort,  // moves half of it, whole sectors
  kError,  // kIo
  kFull,   // kExhausted, nothing written
  kTorn,   // says done; of a write, only the first half is there
  kLost,   // says done; of a write, nothing is there
  kHeld,   // ends when release_held() is called
};

class MemoryDevice : public BlockDevice {
 public:
  explicit MemoryDevice(FileBytes& file)
      : file_(file), event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  // Asked at each operation; without it there are no faults.
  std::function<IoFault(const IoOperation&)> fault;

  void submit(const IoOperation& operation) override {
    const IoFault what = fault ? fault(operation) : IoFault::kNone;
    if (what == IoFault::kHeld) return held_.push_back(operation);
    end(operation, what);
  }
  void release_held() {
    for (const IoOperation& operation : std::exchange(held_, {})) end(operation, IoFault::kNone);
  }
  // Nothing will end before release_held().
  bool all_held() const { return ended_.empty(); }
  std::vector<IoDone> completed() override {
    eventfd_t count = 0;
    eventfd_read(event_.get(), &count);
    return std::exchange(ended_, {});
  }
  Status resize(std::uint64_t bytes) override {
    file_.resize(bytes);
    return Ok{};
  }
  Result<std::uint64_t> size() const override { return file_.size(); }
  int completion_fd() const override { return event_.get(); }
  std::string_view name() const override { return "memory"; }

 private:
  void end(const IoOperation& operation, IoFault what) {
    ended_.push_back({operation.tag, move(operation, what)});
    eventfd_write(event_.get(), 1);
  }

  Result<std::size_t> move(const IoOperation& operation, IoFault what) {
    if (what == IoFault::kError) return Error{ErrorCode::kIo, "injected"};
    if (what == IoFault::kFull) return Error{ErrorCode::kExhausted, "injected"};
    if (what == IoFault::kLost) return operation.bytes;
    std::size_t bytes = operation.bytes;
    if (what != IoFault::kNone) bytes = bytes / 2 / 4096 * 4096;
    if (operation.direction == IoDirection::kWrite) {
      if (file_.size() < operation.offset + bytes) file_.resize(operation.offset + bytes);
      std::memcpy(file_.data() + operation.offset, operation.data, bytes);
    } else {
      const std::size_t end = std::max<std::size_t>(file_.size(), operation.offset);
      bytes = std::min(bytes, end - operation.offset);
      if (bytes > 0) std::memcpy(operation.data, file_.data() + operation.offset, bytes);
    }
    return what == IoFault::kTorn ? operation.bytes : bytes;
  }

  FileBytes& file_;
  FileDescriptor event_;
  std::deque<IoOperation> held_;
  std::vector<IoDone> ended_;
};

}  // namespace foretoken::kvstore
