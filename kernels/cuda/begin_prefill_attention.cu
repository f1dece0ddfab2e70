// begin_prefill_attention: what a padded plan (prefill_attention.cc) needs on the device.
//
//   lengths[0] = rows, lengths[1] = begin + rows
//   v[h, t, :] = 0   for t from begin + rows to the next multiple of kKeyTile, within the scratch
//
// cuDNN reads keys and values in tiles, the last of which goes on behind the tokens. What it finds
// in K there is masked out; a value is multiplied by the weight 0, which leaves NaN where it isn't
// finite. The scratch may hold anything there: what memory had in it, or another prompt's values.
#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kKeyTile = 128;  // the most keys of a tile in cuDNN 9.14's and 9.19's kernels
constexpr int kThreads = 256;

// A block of threads a KV head.
__global__ void begin_prefill_attention_kernel(const PrefillAttentionArgs args,
                                               std::int32_t* lengths, std::size_t first,
                                               std::size_t end) {
  wait_for_earlier_kernels();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    lengths[0] = args.rows;
    lengths[1] = args.begin + args.rows;
  }
  const std::size_t head_bytes = 2 * static_cast<std::size_t>(args.scratch_tokens) * args.head_dim;
  auto* values = static_cast<std::byte*>(args.v) + blockIdx.x * head_bytes;
  for (std::size_t at = first + threadIdx.x * sizeof(uint4); at < end;
       at += kThreads * sizeof(uint4)) {
    *reinterpret_cast<uint4*>(values + at) = uint4{0, 0, 0, 0};
  }
}

}  // namespace

void begin_prefill_attention(const PrefillAttentionArgs& args, std::int32_t* lengths,
                             CudaStream& stream) {
  const int tokens = args.begin + args.rows;
  const int tile_end = std::min(args.scratch_tokens, (tokens + kKeyTile - 1) / kKeyTile * kKeyTile);
  const std::size_t token_bytes = 2 * static_cast<std::size_t>(args.head_dim);
  FT_CHECK(token_bytes % sizeof(uint4) == 0, args.head_dim);
  launch_overlapped(begin_prefill_attention_kernel, dim3(args.num_kv_heads), dim3(kThreads), 0,
                    stream, args, lengths, tokens * token_bytes, tile_end * token_bytes);
}

}  // namespace foretoken::kernels::cuda
