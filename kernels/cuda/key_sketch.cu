// Making the sketches of blocks' keys (kernels/key_sketch.h). A warp makes a block's; a lane takes
// every 32nd dim, whose 16 keys it holds in registers. Reading them: streamed_attention.cu.
#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/cuda/types.cuh"
#include "kernels/cuda/warps.cuh"
#include "kernels/key_sketch.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// keys: [16, head_dim], one behind the other.
template <typename T>
__device__ void sketch_keys(const T* keys, int head_dim, std::byte* sketch) {
  for (int dim = static_cast<int>(threadIdx.x) % 32; dim < head_dim; dim += 32) {
    float key[kBlockTokens];
    float low = INFINITY;
    float high = -INFINITY;
#pragma unroll
    for (int t = 0; t < kBlockTokens; ++t) {
      key[t] = to_float(keys[t * head_dim + dim]);
      low = fminf(low, key[t]);
      high = fmaxf(high, key[t]);
    }
    const std::uint8_t stored =
        step_from_half(__half_as_ushort(__float2half_rn(exact_step(low, high))));
    const float step = __half2float(__ushort_as_half(half_from_step(stored)));
    std::uint32_t codes = 0;
#pragma unroll
    for (int t = 0; t < kBlockTokens; ++t) codes |= level_of(key[t], low, step) << 2 * t;
    reinterpret_cast<std::uint32_t*>(sketch)[dim] = codes;
    reinterpret_cast<T*>(sketch + sketch_low_offset(head_dim))[dim] = from_float<T>(low);
    reinterpret_cast<std::uint8_t*>(sketch + sketch_step_offset(head_dim))[dim] = stored;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sketch_blocks_kernel(SketchBlocksArgs args) {
  const SequenceKv kv = *args.sequence;
  const int head_dim = kv.shape.head_dim;
  require(kv.sketches != nullptr && args.num_kv_heads == kv.shape.num_kv_heads);
  for (int i = warp_index(); i < args.num_kv_heads * args.num_blocks; i += num_warps<kWarps>()) {
    const int head = i / args.num_blocks;
    const int block = i % args.num_blocks;
    const std::size_t row = static_cast<std::size_t>(head) * args.scratch_tokens +
                            static_cast<std::size_t>(block) * kBlockTokens;
    sketch_keys(static_cast<const T*>(args.k) + row * head_dim, head_dim,
                kv.sketches + sketch_offset(kv, args.layer, head, block));
  }
}

// A block that failed its check has no slot, and keeps a sketch of zeros. grid: (warps, rows).
template <typename T>
__global__ void __launch_bounds__(kThreads) sketch_filled_kernel(SketchFilledArgs args) {
  const SequenceKv kv = args.sequences[blockIdx.y];
  require(kv.sketches != nullptr);
  const int length = *kv.length;
  if (length == 0 || length % kBlockTokens != 0) return;
  const int block = length / kBlockTokens - 1;
  const int heads = kv.shape.num_kv_heads;
  for (int i = warp_index(); i < kv.shape.num_layers * heads; i += num_warps<kWarps>()) {
    const int slot = block_to_slot(kv, i / heads, i % heads)[block];
    if (slot == kAbsent) continue;
    sketch_keys(reinterpret_cast<const T*>(kv.slots + slot_offset(kv, i / heads, i % heads, slot)),
                kv.shape.head_dim, kv.sketches + sketch_offset(kv, i / heads, i % heads, block));
  }
}

}  // namespace

void sketch_blocks(const SketchBlocksArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.num_blocks * kBlockTokens <= args.scratch_tokens, args.num_blocks);
  const int blocks = args.num_kv_heads * args.num_blocks;
  if (blocks == 0) return;
  with_half_type(activation, [&](auto tag) {
    sketch_blocks_kernel<typename decltype(tag)::type>
        <<<(blocks + kWarps - 1) / kWarps, kThreads, 0, stream.handle()>>>(args);
  });
  FT_CUDA(cudaGetLastError());
}

void sketch_filled(const SketchFilledArgs& args, DataType activation, CudaStream& stream) {
  if (args.rows == 0) return;
  const dim3 grid(kCopyCtas, static_cast<unsigned>(args.rows));
  with_half_type(activation, [&](auto tag) {
    sketch_filled_kernel<typename decltype(tag)::type>
        <<<grid, kThreads, 0, stream.handle()>>>(args);
  });
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels::cuda
