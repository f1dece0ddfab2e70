// The choice of SelectTraceArgs, as one formula for both devices.
//
// The candidates are cut into `count` strata of equal size, and each gives one block: so blocks are
// sorted and distinct, and lie scattered over the context. A stratum moves on to another block in
// a share `churn` of the steps; strata take turns, so that each step has the same share of new
// ones.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kept_blocks.h"
#include "kernels/kv_layout.h"

namespace foretoken::kernels {

struct TraceChoice {
  std::int32_t first_block;  // of the candidates
  std::int32_t stratum;      // blocks; 0: fewer candidates than `count`
  std::int32_t count;        // chosen
  std::int64_t moves;        // 16.16 fixed point: how often a stratum has moved on

  constexpr std::int32_t block(int head, int i) const {
    if (stratum == 0) return first_block + i;
    // Golden-ratio phases spread evenly over any range of i and of heads.
    const std::uint32_t phase = (static_cast<std::uint32_t>(head * 31 + i) * 40503U) & 0xFFFFU;
    const std::int64_t move = (moves + phase) >> 16;
    constexpr std::int64_t kStride = 7919;  // a prime: all blocks of a smaller stratum come in turn
    return first_block + i * stratum + static_cast<std::int32_t>(move * kStride % stratum);
  }
};

constexpr TraceChoice trace_choice(int length, int count, float churn) {
  const int candidates = std::max(0, first_local_block(length) - kSinkBlocks);
  const auto moves_a_step = static_cast<std::int64_t>(churn * 65536.0F + 0.5F);
  const int chosen = std::min(count, candidates);
  return {kSinkBlocks, candidates > count && count > 0 ? candidates / count : 0, chosen,
          moves_a_step * length};
}

}  // namespace foretoken::kernels
