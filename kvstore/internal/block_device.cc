#include "kvstore/internal/block_device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "common/log.h"

namespace foretoken::kvstore {

IoMemory::IoMemory(std::size_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Exception(ErrorCode::kExhausted,
                    "no " + std::to_string(bytes) + " bytes for the NVMe tier's buffers");
  }
  bytes_ = {static_cast<std::byte*>(mapped), bytes};
  madvise(mapped, bytes, MADV_HUGEPAGE);  // an operation is of fewer pieces; where not, no harm
  std::ranges::fill(bytes_, std::byte{0});
}

IoMemory::IoMemory(IoMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

IoMemory::~IoMemory() {
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
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

std::unique_ptr<BlockDevice> make_block_device(int file, const IoMemory& memory, int depth) {
  auto uring = make_uring_device(file, memory, depth);
  if (!uring) log().warn("NVMe tier: {}; using threads instead", uring.error().message);
  auto device = uring ? *std::move(uring) : make_thread_device(file, depth);
  log().info("NVMe tier: {}, depth {}", device->name(), depth);
  return device;
}

}  // namespace foretoken::kvstore
