#include "common/available_memory.h"

#include <unistd.h>

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

std::uint64_t limit_of(const std::string& folder) {
  return std::min(bound_in(folder + "/memory.max"), bound_in(folder + "/memory.limit_in_bytes"));
}

// The least over our control groups and those around them, each of which bounds us.
template <typename Bound>
std::uint64_t least_of_control_groups(const Bound& bound) {
  std::ifstream file("/proc/self/cgroup");
  std::uint64_t least = kUnbounded;
  for (const auto& folder : control_group_folders(file)) least = std::min(least, bound(folder));
  return least;
}

}  // namespace

std::vector<std::string> control_group_folders(std::istream& groups) {
  std::vector<std::string> folders = {"/sys/fs/cgroup", "/sys/fs/cgroup/memory"};
  for (std::string line; std::getline(groups, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool is_second = controllers.empty();
    if (!is_second && controllers.find("memory") == std::string::npos) continue;
    for (auto path = line.substr(second + 1); path.size() > 1;
         path.resize(path.find_last_of('/'))) {
      folders.push_back(folders[is_second ? 0 : 1] + path);
    }
  }
  return folders;
}

std::uint64_t host_memory() {
  const auto pages = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES));
  return std::min(pages * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)),
                  least_of_control_groups(limit_of));
}

std::uint64_t available_host_memory() {
  return std::min(mem_available(), least_of_control_groups(left_in_control_group));
}

std::uint64_t left_in_control_group(const std::string& folder) {
  const std::uint64_t limit = limit_of(folder);
  const std::uint64_t used =
      std::min(bound_in(folder + "/memory.current"), bound_in(folder + "/memory.usage_in_bytes"));
  if (limit == kUnbounded || used == kUnbounded) return limit;
  const std::string stat = folder + "/memory.stat";
  const std::uint64_t droppable = stat_in(stat, "active_file") + stat_in(stat, "inactive_file");
  const std::uint64_t held = used - std::min(used, droppable);
  return limit - std::min(limit, held);
}

}  // namespace foretoken
