// What the machine can give this process, so that an arena is refused at start instead of the
// process being killed when it fills.
#pragma once

#include <cstdint>

namespace foretoken::kvstore {

// Bytes: the kernel's MemAvailable, or the limit of our control group where that is less (both
// versions of cgroups). What can't be read does not bound.
std::uint64_t available_host_memory();

}  // namespace foretoken::kvstore
