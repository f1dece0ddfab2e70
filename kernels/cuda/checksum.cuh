// The checksum of a KV block (kv_layout.h) in device code: a block is read as vectors of two words
// by the lanes of a warp, in any order.
#pragma once

#include "kernels/kv_layout.h"

namespace foretoken::kernels::cuda {

using WordPair = ulonglong2;  // 16 bytes: words 2 * i and 2 * i + 1 of the block

__device__ inline std::uint64_t mix_pair(WordPair words, int index) {
  const auto first = 2 * static_cast<std::uint64_t>(index);
  return mix_word(words.x, first) + mix_word(words.y, first + 1);
}

__device__ inline std::uint64_t warp_sum_words(std::uint64_t sum) {
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(~0U, static_cast<unsigned long long>(sum), offset);
  }
  return sum;
}

}  // namespace foretoken::kernels::cuda
