// Doctor: does this machine have what Foretoken needs? One finding a line, with its fix.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace foretoken::launch {

enum class Health { kOk, kWarn, kFail };

struct Finding {
  Health health = Health::kOk;
  std::string what;   // "CPU features"
  std::string found;  // "AVX2, F16C"
  std::string fix;    // what to do; empty where all is well
};

// Without the fix where all is well.
Finding finding(Health health, std::string what, std::string found, std::string fix);

std::string_view name_of(Health health);  // "ok", "warn", "fail"

// Looks at the machine; takes about a second, one more a GPU, and two to try how much can be
// pinned. `port`: what a service would bind.
std::vector<Finding> examine_machine(int port);

}  // namespace foretoken::launch
