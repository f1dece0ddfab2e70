#include "kvstore/internal/host_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace foretoken::kvstore {
namespace {

constexpr auto kUnbounded = std::numeric_limits<std::uint64_t>::max();

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

}  // namespace foretoken::kvstore
