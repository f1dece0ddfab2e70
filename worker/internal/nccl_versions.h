// Whether the NCCL libraries that the ranks have loaded fit this program and each other.
#pragma once

#include <span>
#include <string>

#include "common/result.h"

namespace foretoken::worker {

// NCCL's number, major * 10000 + minor * 100 + patch since 2.9: 22803 is 2.28.3.
std::string nccl_version_name(int version);

// Empty where `loaded` has all that `built`, whose header this program was built with, promises:
// patches of a minor version are alike.
std::string why_nccl_is_too_old(int loaded, int built);

// loaded: of each rank. Error: kDevice, when one is too old, or when they differ: NCCL connects
// equal ones only.
Status check_nccl_versions(std::span<const int> loaded, int built);

}  // namespace foretoken::worker
