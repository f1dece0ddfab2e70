// Attention of one query over some KV blocks, for all query heads of a KV head: a part of the
// whole, to be merged with the other parts of the sequence.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/kv_layout.h"

namespace foretoken::kernels::simd {

// Blocks of a part: few enough to spread a short sequence over some threads.
inline constexpr int kPartBlocks = 16;

struct KvBlock {
  const std::byte* data;  // [2 (K, V), 16, head_dim] of the KV type
  int tokens;             // 1..16 of them hold a token
  int column;             // where its maximum goes
};

struct DecodePartArgs {
  const float* q;  // [group, head_dim]
  int group;
  int head_dim;
  DataType kv_type;
  float scale;
  float* block_max;  // [group, pitch] natural logits, or null
  int pitch;
};

// The softmax of a part to base 2, not yet normalised: out [group, head_dim] = sum of 2^(score -
// maximum) * value, and [group] maxima (-inf without blocks) and sums of weights. With out null,
// values are not read.
struct DecodePartResult {
  float* out;
  float* maximum;
  float* sum;
};

// REQUIRES: blocks.size() <= kPartBlocks; head_dim is a multiple of 32.
void attend_part(const DecodePartArgs& args, std::span<const KvBlock> blocks,
                 const DecodePartResult& result);

// out [head_dim] = the merge of `count` parts of one query head, whose values lie `stride` floats
// apart; returns the natural log-sum-exp. Without any block: zeros and -inf. out may be null.
float merge_parts(const DecodePartResult& first, std::size_t stride, int count, int head_dim,
                  float* out);

}  // namespace foretoken::kernels::simd
