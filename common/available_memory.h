// What memory this machine has, and can still give.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

namespace foretoken {

// Bytes: the machine's memory, or the limit of a control group that we are in, as a job of Slurm's
// is, where that is less. What can't be read does not bound.
std::uint64_t host_memory();

// ... that can still be had: the kernel's MemAvailable, or what is left in such a control group. So
// that memory is refused at the start instead of the process being killed when it fills.
std::uint64_t available_host_memory();

// The folders of the control groups that /proc/self/cgroup names ("0::/path" in version 2,
// "N:...memory...:/path" in version 1), and of all around them. Inside a container a path may not
// be visible; its root then is.
std::vector<std::string> control_group_folders(std::istream& groups);

// The limit of the control group in this folder (of either version), less what it holds but for
// files' pages, which give way.
std::uint64_t left_in_control_group(const std::string& folder);

}  // namespace foretoken
