#include "kvstore/internal/host_memory.h"

#include <fcntl.h>
#include <numa.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>

#include "common/check.h"
#include "common/log.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which glibc's headers of Debian 12 lack

Error failed(const std::string& what, std::size_t bytes) {
  return {ErrorCode::kIo, what + " failed for memory of " + std::to_string(bytes) +
                              " bytes: " + std::strerror(errno)};
}

std::size_t up_to_pages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// Of the whole huge pages among the bytes, those that the kernel makes. Shared memory has none by
// itself where shmem_enabled is "never", as it is by default; this asks in spite of that.
void take_huge_pages(std::byte* begin, std::size_t bytes) {
  const std::size_t before =
      (kHugePageBytes - reinterpret_cast<std::uintptr_t>(begin) % kHugePageBytes) % kHugePageBytes;
  if (bytes < before + kHugePageBytes) return;
  begin += before;
  bytes = (bytes - before) / kHugePageBytes * kHugePageBytes;
  // It makes one of the small pages that are there, on their node. Where pages go to the nodes in
  // turn, by their number, one in each huge page does so too, if it is the right one.
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const auto nodes = static_cast<std::size_t>(num_numa_nodes());
  for (std::size_t at = 0; at < bytes; at += kHugePageBytes) {
    const std::size_t index = reinterpret_cast<std::uintptr_t>(begin + at) / kHugePageBytes;
    const std::size_t shift = (kHugePageBytes / page - 1) * (index % nodes) % nodes;
    const std::size_t small = (nodes - shift) % nodes;
    if (madvise(begin + at + small * page, page, MADV_POPULATE_WRITE) != 0) return;
  }
  if (madvise(begin, bytes, kCollapse) == 0) return;
  static std::once_flag said;
  std::call_once(said, [reason = errno] {
    log().warn(
        "the kernel gives (some) memory in small pages, which take longer to be there and to "
        "be pinned: {}; it has huge ones for us since Linux 6.1, unless "
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled is \"deny\"",
        std::strerror(reason));
  });
}

}  // namespace

int num_numa_nodes() { return numa_available() < 0 ? 1 : numa_max_node() + 1; }

Result<FileDescriptor> make_shared_memory(const char* name, std::size_t bytes) {
  FileDescriptor memory(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory || fchmod(memory.get(), 0600) != 0) return failed("memfd_create", bytes);
  if (ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) return failed("ftruncate", bytes);
  FT_RETURN_IF_ERROR(seal(memory, F_SEAL_SHRINK | F_SEAL_GROW));
  return memory;
}

Status seal(const FileDescriptor& memory, int seals) {
  if (fcntl(memory.get(), F_ADD_SEALS, seals) == 0) return Ok{};
  return Error{ErrorCode::kIo, std::string("sealing memory: ") + std::strerror(errno)};
}

Result<SharedMapping> SharedMapping::map(int memory_fd, std::size_t offset, std::size_t bytes) {
  // Room for an address that lies in its huge page as the offset does.
  const std::size_t room = bytes + kHugePageBytes;
  void* reserved = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) return failed("mmap", room);
  const std::size_t skipped =
      (offset - reinterpret_cast<std::uintptr_t>(reserved)) % kHugePageBytes;
  auto* base = static_cast<std::byte*>(reserved) + skipped;
  if (mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory_fd,
           static_cast<off_t>(offset)) == MAP_FAILED) {
    const Error error = failed("mmap", bytes);
    munmap(reserved, room);
    return error;
  }
  if (skipped > 0) munmap(reserved, skipped);
  std::byte* end = base + up_to_pages(bytes);
  munmap(end, static_cast<std::size_t>(static_cast<std::byte*>(reserved) + room - end));
  madvise(base, bytes, MADV_HUGEPAGE);  // where shmem_enabled is "advise"
  return SharedMapping(base, bytes);
}

SharedMapping::~SharedMapping() {
  if (base_ != nullptr) munmap(base_, bytes_);
}

void SharedMapping::cut(std::size_t bytes) {
  FT_CHECK(bytes > 0 && bytes <= bytes_, bytes, bytes_);
  if (bytes < bytes_) FT_CHECK(munmap(base_ + bytes, bytes_ - bytes) == 0, errno);
  bytes_ = bytes;
}

bool populate(std::byte* begin, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t before = reinterpret_cast<std::uintptr_t>(begin) % page;
  begin -= before;
  bytes += before;
  take_huge_pages(begin, bytes);
  if (madvise(begin, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;
  for (std::size_t at = 0; at < bytes; at += page) {  // Linux before 5.14
    std::atomic_ref<char>(*reinterpret_cast<char*>(begin + at)).fetch_or(0);
  }
  return true;
}

}  // namespace foretoken::kvstore
