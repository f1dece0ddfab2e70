// What `foretoken doctor` says of GPUs.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "launch/internal/doctor.h"

namespace foretoken::launch {

// probe: what `foretoken-worker --probe-devices` answers (worker/device_probe.h). root: where /proc
// and /sys of the machine are; "/" but for tests.
std::vector<Finding> describe_gpus(const nlohmann::json& probe, const std::filesystem::path& root);

}  // namespace foretoken::launch
