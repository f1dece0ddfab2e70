#include "kvstore/internal/host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

namespace foretoken::kvstore {
namespace {

constexpr auto kUnbounded = std::numeric_limits<std::uint64_t>::max();

Error failed(const std::string& what, std::size_t bytes) {
  return {ErrorCode::kIo, what + " failed for memory of " + std::to_string(bytes) +
                              " bytes: " + std::strerror(errno)};
}

// The number a file begins with; "max" and what is absent mean no bound.
std::uint64_t bound_in(const std::string& path) {
  std::uint64_t value = 0;
  std::ifstream file(path);
  return file >> value ? value : kUnbounded;
}

std::uint64_t mem_available() {
  std::ifstream file("/proc/meminfo");
  std::string name;
  std::uint64_t kilobytes = 0;
  for (std::string unit; file >> name >> kilobytes; std::getline(file, unit)) {
    if (name == "MemAvailable:") return kilobytes * 1024;
  }
  return kUnbounded;
}

// /proc/self/cgroup: "0::/path" in version 2, "N:...memory...:/path" in version 1. Inside a
// container the path may not be visible; its root then is.
std::uint64_t control_group_limit() {
  std::uint64_t limit = std::min(bound_in("/sys/fs/cgroup/memory.max"),
                                 bound_in("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      limit = std::min(limit, bound_in("/sys/fs/cgroup" + path + "/memory.max"));
    } else if (controllers.find("memory") != std::string::npos) {
      limit = std::min(limit, bound_in("/sys/fs/cgroup/memory" + path + "/memory.limit_in_bytes"));
    }
  }
  return limit;
}

}  // namespace

std::uint64_t available_host_memory() { return std::min(mem_available(), control_group_limit()); }

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

void prefer_huge_pages(std::byte* begin, std::size_t bytes) {
  madvise(begin, bytes, MADV_HUGEPAGE);
}

bool populate(std::byte* begin, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t before = reinterpret_cast<std::uintptr_t>(begin) % page;
  begin -= before;
  bytes += before;
  if (madvise(begin, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;
  for (std::size_t at = 0; at < bytes; at += page) {  // Linux before 5.14
    std::atomic_ref<char>(*reinterpret_cast<char*>(begin + at)).fetch_or(0);
  }
  return true;
}

}  // namespace foretoken::kvstore
