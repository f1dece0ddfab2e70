#include "common/available_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>

namespace foretoken {
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

// A field of memory.stat: "name bytes" a line.
std::uint64_t stat_in(const std::string& path, const std::string& wanted) {
  std::ifstream file(path);
  std::string name;
  for (std::uint64_t value = 0; file >> name >> value;) {
    if (name == wanted) return value;
  }
  return 0;
}

// /proc/self/cgroup: "0::/path" in version 2, "N:...memory...:/path" in version 1. Inside a
// container the path may not be visible; its root then is.
std::uint64_t left_in_control_groups() {
  std::uint64_t left = std::min(left_in_control_group("/sys/fs/cgroup"),
                                left_in_control_group("/sys/fs/cgroup/memory"));
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      left = std::min(left, left_in_control_group("/sys/fs/cgroup" + path));
    } else if (controllers.find("memory") != std::string::npos) {
      left = std::min(left, left_in_control_group("/sys/fs/cgroup/memory" + path));
    }
  }
  return left;
}

}  // namespace

std::uint64_t available_host_memory() {
  return std::min(mem_available(), left_in_control_groups());
}

std::uint64_t left_in_control_group(const std::string& folder) {
  const std::uint64_t limit =
      std::min(bound_in(folder + "/memory.max"), bound_in(folder + "/memory.limit_in_bytes"));
  const std::uint64_t used =
      std::min(bound_in(folder + "/memory.current"), bound_in(folder + "/memory.usage_in_bytes"));
  if (limit == kUnbounded || used == kUnbounded) return limit;
  const std::string stat = folder + "/memory.stat";
  const std::uint64_t droppable = stat_in(stat, "active_file") + stat_in(stat, "inactive_file");
  const std::uint64_t held = used - std::min(used, droppable);
  return limit - std::min(limit, held);
}

}  // namespace foretoken
