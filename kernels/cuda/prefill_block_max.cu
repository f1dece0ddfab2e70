// Block maxima of the logits of the last queries of a prefill, on tensor cores.
//
// A CTA holds kTileRows rows of queries (token and head of one KV head's group) in shared memory,
// and walks over kSpanTokens keys, kTileTokens at a time, double-buffered. A warp multiplies 32
// rows with 64 tokens; the maximum over a block's 16 tokens stays within the warp.
// Keys are read once for each kTileRows rows: once a layer for 64 tokens and groups of up to 4.
#include <limits>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpRows = 32;
constexpr int kTileRows = kWarps * kWarpRows;
constexpr int kTileTokens = 64;
constexpr int kTileBlocks = kTileTokens / kBlockTokens;
constexpr int kSpanTokens = 512;
constexpr int kVector = 8;  // 16-bit values in 16 bytes
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Values from one row of shared memory to the next. An odd multiple of 16 bytes: 8 rows of an
// ldmatrix lie in different banks.
__host__ __device__ constexpr int row_stride(int head_dim) { return head_dim + kVector; }

std::size_t shared_bytes(int head_dim) {
  return static_cast<std::size_t>(kTileRows + 2 * kTileTokens) *
         static_cast<std::size_t>(row_stride(head_dim)) * 2;
}

// What a CTA works on: rows of the group of one KV head. Row m is query head m / rows of the
// group, token m % rows.
template <typename T>
struct Tile {
  const PrefillBlockMaxArgs& args;
  int kv_head;
  int first_row;
  int num_rows;  // of the group, in all
  T* q;          // shared [kTileRows, row_stride]
  T* k;          // shared [2, kTileTokens, row_stride]

  __device__ int stride() const { return row_stride(args.head_dim); }
  __device__ T* k_buffer(int i) const { return k + (i & 1) * kTileTokens * stride(); }

  __device__ void load_queries() const {
    const int group = args.num_heads / args.num_kv_heads;
    const int vectors = args.head_dim / kVector;
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * vectors; i += kThreads) {
      const int row = i / vectors;
      const int m = first_row + row;
      const int column = i % vectors * kVector;
      const bool valid = m < num_rows;
      const int head = valid ? kv_head * group + m / args.rows : 0;
      const int token = valid ? m % args.rows : 0;
      const auto* from =
          static_cast<const T*>(args.q) +
          (static_cast<std::ptrdiff_t>(token) * args.num_heads + head) * args.head_dim + column;
      copy_async(q + row * stride() + column, from, valid);
    }
  }

  __device__ void load_keys(int first_token, T* to) const {
    const int tokens = args.begin + args.rows;
    const int vectors = args.head_dim / kVector;
    const T* head = static_cast<const T*>(args.k) +
                    static_cast<std::ptrdiff_t>(kv_head) * args.scratch_tokens * args.head_dim;
    for (int i = static_cast<int>(threadIdx.x); i < kTileTokens * vectors; i += kThreads) {
      const int token = first_token + i / vectors;
      const int column = i % vectors * kVector;
      const bool valid = token < tokens;
      const T* from =
          head + static_cast<std::ptrdiff_t>(valid ? token : 0) * args.head_dim + column;
      copy_async(to + i / vectors * stride() + column, from, valid);
    }
  }

  // logits[i][j]: 16 rows of the warp by 8 tokens.
  __device__ void multiply(const T* keys, float (&logits)[2][8][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // Matrices of A: rows 0-7, 8-15 of columns 0-7, then of 8-15. Of B: columns 0-7, 8-15 of tokens
    // 0-7, then of 8-15.
    const T* q_row = q + (static_cast<int>(threadIdx.x) / 32 * kWarpRows + lane % 16) * stride() +
                     lane / 16 * kVector;
    const T* k_row = keys + (lane % 8 + lane / 16 * 8) * stride() + lane / 8 % 2 * kVector;
    for (int column = 0; column < args.head_dim; column += 16) {
      std::uint32_t a[2][4];
      load_matrices(a[0], q_row + column);
      load_matrices(a[1], q_row + 16 * stride() + column);
#pragma unroll
      for (int block = 0; block < kTileBlocks; ++block) {
        std::uint32_t b[4];
        load_matrices(b, k_row + block * kBlockTokens * stride() + column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<T>(logits[i][2 * block], a[i], b[0], b[1]);
          mma<T>(logits[i][2 * block + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Maxima of the blocks from first_token on, which starts a tile.
  __device__ void store_maxima(int first_token, float (&logits)[2][8][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int q4 = lane % 4;
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // rows g, g + 8, g + 16, g + 24 of the warp
      const int m =
          first_row + static_cast<int>(threadIdx.x) / 32 * kWarpRows + part * 8 + lane / 4;
      const int last_token = args.begin + m % args.rows;  // that the row sees
      float mine = kMinusInfinity;
#pragma unroll
      for (int block = 0; block < kTileBlocks; ++block) {
        float highest = kMinusInfinity;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int token = first_token + block * kBlockTokens + n * 8 + q4 * 2 + c;
            const float logit = logits[part / 2][2 * block + n][part % 2 * 2 + c];
            if (token <= last_token) highest = fmaxf(highest, logit);
          }
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, 2));
        if (block == q4) mine = highest;
      }
      const int column = first_token / kBlockTokens + q4;
      if (m < num_rows && column < args.pitch) {
        args.block_max[(static_cast<std::ptrdiff_t>(kv_head) * num_rows + m) * args.pitch +
                       column] = mine * args.scale;
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) block_max_kernel(const PrefillBlockMaxArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  auto* q = reinterpret_cast<T*>(shared);
  const Tile<T> tile{args,
                     static_cast<int>(blockIdx.z),
                     static_cast<int>(blockIdx.y) * kTileRows,
                     args.num_heads / args.num_kv_heads * args.rows,
                     q,
                     q + kTileRows * row_stride(args.head_dim)};
  const int tokens = args.begin + args.rows;
  const int first = static_cast<int>(blockIdx.x) * kSpanTokens;
  const int end = min(first + kSpanTokens, args.pitch * kBlockTokens);
  if (first < tokens) {
    tile.load_queries();
    tile.load_keys(first, tile.k_buffer(0));
  }
  commit_copies();
  for (int token = first, i = 0; token < end; token += kTileTokens, ++i) {
    float logits[2][8][4] = {};
    if (token < tokens) {
      const int next = token + kTileTokens;
      if (next < min(end, tokens)) tile.load_keys(next, tile.k_buffer(i + 1));
      commit_copies();
      wait_copies<1>();
      __syncthreads();
      tile.multiply(tile.k_buffer(i), logits);
      __syncthreads();  // before the next round overwrites this buffer
    }
    tile.store_maxima(token, logits);
  }
}

}  // namespace

void prefill_block_max(const PrefillBlockMaxArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0, args.num_heads,
           args.num_kv_heads);
  FT_CHECK(args.head_dim % 32 == 0 && args.head_dim > 0 && args.head_dim <= 256, args.head_dim);
  FT_CHECK(args.kv_type == activation, static_cast<int>(args.kv_type));
  FT_CHECK(args.scale > 0, args.scale);
  FT_CHECK(args.begin + args.rows <= args.scratch_tokens, args.begin, args.rows);
  FT_CHECK(args.begin + args.rows <= args.pitch * kBlockTokens, args.begin, args.rows, args.pitch);
  if (args.rows == 0) return;
  const auto divide_up = [](int a, int b) { return static_cast<unsigned>((a + b - 1) / b); };
  const dim3 grid(divide_up(args.pitch * kBlockTokens, kSpanTokens),
                  divide_up(args.num_heads / args.num_kv_heads * args.rows, kTileRows),
                  static_cast<unsigned>(args.num_kv_heads));
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::size_t bytes = shared_bytes(args.head_dim);
    FT_CUDA(cudaFuncSetAttribute(block_max_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
    block_max_kernel<T><<<grid, kThreads, bytes, stream.handle()>>>(args);
    FT_CUDA(cudaGetLastError());
  });
}

}  // namespace foretoken::kernels::cuda
