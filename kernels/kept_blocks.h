// Which blocks are always on the device: the sink, and the local window.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ids.h"

namespace foretoken::kernels {

inline constexpr int kSinkBlocks = kSinkTokens / kBlockTokens;

// The first block of the local window of the step whose token is at `position`: every block that
// touches the last kLocalTokens tokens, that one included, is in it.
constexpr int first_local_block(std::int64_t position) {
  return static_cast<int>(std::max(std::int64_t{0}, position + 1 - kLocalTokens) / kBlockTokens);
}

}  // namespace foretoken::kernels
