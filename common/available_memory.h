// What memory this machine can still give.
#pragma once

#include <cstdint>
#include <string>

namespace foretoken {

// Bytes: the kernel's MemAvailable, or what is left in our control group where that is less. What
// can't be read does not bound. So that memory is refused at the start instead of the process being
// killed when it fills.
std::uint64_t available_host_memory();

// The limit of the control group in this folder (of either version), less what it holds but for
// files' pages, which give way.
std::uint64_t left_in_control_group(const std::string& folder);

}  // namespace foretoken
