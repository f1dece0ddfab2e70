#include "launch/internal/machine.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace foretoken::launch {
namespace {

// The value of the first line of /proc/cpuinfo with this key.
std::string cpuinfo(const std::string& key) {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const auto colon = line.find(':');
    return colon == std::string::npos || colon + 2 > line.size() ? "" : line.substr(colon + 2);
  }
  return "";
}

}  // namespace

std::string machine_name() {
  const std::string name = cpuinfo("model name");
  return (name.empty() ? "unknown CPU" : name) + ", " + std::to_string(num_usable_cores()) +
         " cores";
}

int num_usable_cores() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 1;
  return std::max(1, CPU_COUNT(&cores));
}

bool cpu_has(const char* flag) {
  std::istringstream flags(cpuinfo("flags"));
  for (std::string word; flags >> word;) {
    if (word == flag) return true;
  }
  return false;
}

}  // namespace foretoken::launch
