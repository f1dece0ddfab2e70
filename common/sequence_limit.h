// How long a sequence may be: what its Reserve's keys leave room for in a message to the store
// (docs/formats.md, "Store protocol").
#pragma once

#include <cstdint>

#include "common/ids.h"

namespace foretoken {

inline constexpr int kMaxSegments = 5'000;
inline constexpr std::int64_t kMaxTokens = std::int64_t{kMaxSegments} * kSegmentTokens;

}  // namespace foretoken
