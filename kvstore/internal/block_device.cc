#include "kvstore/internal/block_device.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "common/log.h"

namespace foretoken::kvstore {

IoMemory::IoMemory(std::size_t bytes) : count_(bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Exception(ErrorCode::kExhausted,
                    "no " + std::to_string(bytes) + " bytes for the NVMe tier's buffers");
  }
  bytes_ = {static_cast<std::byte*>(mapped), [bytes](std::byte* begin) { munmap(begin, bytes); }};
  madvise(mapped, bytes, MADV_HUGEPAGE);  // an operation is of fewer pieces; where not, no harm
  std::memset(mapped, 0, bytes);
}

Result<std::size_t> io_result(std::int64_t count) {
  if (count >= 0) return static_cast<std::size_t>(count);
  const bool is_full = count == -ENOSPC || count == -EDQUOT;
  return Error{is_full ? ErrorCode::kExhausted : ErrorCode::kIo,
               std::strerror(static_cast<int>(-count))};
}

Status resize_file(int file, std::uint64_t bytes) {
  if (ftruncate(file, static_cast<off_t>(bytes)) == 0) return Ok{};
  return io_result(-errno).error();
}

Result<std::uint64_t> size_of_file(int file) {
  struct stat info {};
  if (fstat(file, &info) != 0) return io_result(-errno).error();
  return static_cast<std::uint64_t>(info.st_size);
}

void log_left_behind(std::size_t num_operations) {
  log().warn(
      "NVMe tier: {} operations have not ended after {} s; their memory is kept until they do",
      num_operations, kEndLimit.count());
}

std::unique_ptr<BlockDevice> make_block_device(int file, const IoMemory& memory, int depth) {
  auto uring = make_uring_device(file, memory, depth);
  if (!uring) log().warn("NVMe tier: {}; using threads instead", uring.error().message);
  auto device = uring ? *std::move(uring) : make_thread_device(file, memory, depth);
  log().info("NVMe tier: {}, depth {}", device->name(), depth);
  return device;
}

}  // namespace foretoken::kvstore
