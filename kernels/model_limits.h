// What a GPU takes of a model's shape, for who configures it; more is a broken REQUIRES. A CPU
// takes any.
#pragma once

namespace foretoken::kernels {

// Query heads of a KV head on a rank: in attention over all blocks a lane keeps each one's sums.
inline constexpr int kMaxGroup = 32;
// Of sample(): the sum of all weights, of 2^45 at most, stays below 2^64.
inline constexpr int kMaxVocab = (1 << 19) - 1;

}  // namespace foretoken::kernels
