// Host memory that other processes map: memory that no name leads to, and its pages before anybody
// needs them.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "common/result.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

// 1 where the machine does not tell.
int num_numa_nodes();

// A memfd of this size for good: sealed against shrinking and growing. `name` is what /proc shows;
// nobody opens it by that, and only our user by /proc. Error: kIo.
Result<FileDescriptor> make_shared_memory(const char* name, std::size_t bytes);

// Further seals (fcntl's F_SEAL_*). Error: kIo; F_SEAL_WRITE while somebody has it mapped to write.
Status seal(const FileDescriptor& memory, int seals);

// Shared memory, mapped to be read and written; at an address that lets the kernel map its huge
// pages as such.
class SharedMapping {
 public:
  // offset: a multiple of the page size. Error: kIo; e.g. `ulimit -v`.
  static Result<SharedMapping> map(int memory_fd, std::size_t offset, std::size_t bytes);
  SharedMapping() = default;
  ~SharedMapping();
  SharedMapping(SharedMapping&& other) noexcept { *this = std::move(other); }
  SharedMapping& operator=(SharedMapping&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  std::byte* base() const { return base_; }
  std::size_t bytes() const { return bytes_; }
  // Unmaps what lies behind the first `bytes`. REQUIRES: whole pages, at least one.
  void cut(std::size_t bytes);

 private:
  SharedMapping(std::byte* base, std::size_t bytes) : base_(base), bytes_(bytes) {}
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
};

// Makes the kernel back the bytes with memory, without changing them: with huge pages where it can
// (Linux 6.1), which takes a sixth of the time, and of registering it with a GPU half. False, with
// errno: there is none.
bool populate(std::byte* begin, std::size_t bytes);

}  // namespace foretoken::kvstore
