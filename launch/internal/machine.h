// What this machine has.
#pragma once

#include <cstdint>
#include <string>

namespace foretoken::launch {

std::string machine_name();      // the CPU's model name
int num_usable_cores();          // that this process may run on
bool cpu_has(const char* flag);  // of /proc/cpuinfo, as "avx2"

}  // namespace foretoken::launch
