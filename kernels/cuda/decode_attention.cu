// decode_attention: one query a sequence over its resident blocks, bound by reading K and V once.
//
// A block of threads takes a share of one (row, KV head)'s slots; its 16 warps take a slot in turn.
// All query heads of the KV head (8 at a time) share the loads. With K as the tensor cores' left
// operand, a KV block's 16 tokens are the 16 rows and the query heads the 8 columns:
//   logits^T [16 tokens, 8 heads] = K [16, head_dim] Q^T        head_dim / 16 steps
//   out^T [head_dim, 8 heads] += V^T [head_dim, 16] P^T         head_dim / 16 tiles
// K goes from memory into registers with 16-byte loads (mma.cuh: the inner order is free). For V^T
// a lane loads 8 neighbours of four tokens' rows and pairs the tokens up; which row of the output
// stands for which element is free too, and undone when it is stored. P^T is logits^T's fragment,
// transposed in registers.
//
// The softmax is online (FlashAttention-2, Dao 2023, section 3.1): each warp keeps its maxima and
// sums, the warps meet in shared memory, and the shares meet in the last block to arrive.
#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeads = 8;              // query heads that share a pass
constexpr int kMaxParts = 160;         // that are merged at once: warps or shares
constexpr int kMinShare = kWarps;      // slots; fewer are not worth another merge
constexpr float kLog2E = 1.44269504F;  // exponentials are of base 2 inside
constexpr float kNothing = -INFINITY;

template <typename T>
struct Params {
  const T* q;
  const SequenceKv* sequences;
  int layer;
  int num_heads;
  int num_kv_heads;
  int group;  // query heads a KV head
  float scale_log2;
  T* out;
  float* lse;
  float* partial_out;   // [rows, num_heads, shares, head_dim]
  float2* partial_sum;  // [rows, num_heads, shares] (maximum, sum)
  std::uint32_t* counters;
};

// What a warp has attended: lane (g, q) has heads 2q and 2q + 1.
template <int kHeadDim>
struct Accumulator {
  float out[kHeadDim / 16][4] = {};
  float maximum[2] = {kNothing, kNothing};
  float sum[2] = {};  // of this lane's tokens
};

// A KV block in registers.
template <int kHeadDim>
struct BlockTile {
  static constexpr int kLoads = kHeadDim / 32;  // of K, a token row and lane
  uint4 k[2][kLoads];                           // tokens g and g + 8
  uint4 v[kHeadDim / 64][4];                    // tokens 2q, 2q + 1, 2q + 8, 2q + 9

  template <typename T>
  __device__ void load(const T* block, int g, int q) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      k[0][i] = load_once(block + g * kHeadDim + 32 * i + 8 * q);
      k[1][i] = load_once(block + (g + 8) * kHeadDim + 32 * i + 8 * q);
    }
    const T* values = block + kBlockTokens * kHeadDim;
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token = 2 * q + t % 2 + t / 2 * 8;
        v[i][t] = load_once(values + token * kHeadDim + 64 * i + 8 * g);
      }
    }
  }

  // Rows past the open block's last token may hold anything, NaN too: they count as zero.
  __device__ void clear_values_from(int num_tokens, int q) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int token = 2 * q + t % 2 + t / 2 * 8;
      if (token < num_tokens) continue;
#pragma unroll
      for (auto& part : v) part[t] = uint4{0, 0, 0, 0};
    }
  }
};

// The query heads [first, first + 8) of a KV head as right operand; heads past the group are zero.
template <typename T, int kHeadDim>
struct QueryTile {
  uint4 q8[kHeadDim / 32];
  __device__ void load(const T* q_heads, int num_heads, int g, int q) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      q8[i] = g < num_heads
                  ? *reinterpret_cast<const uint4*>(q_heads + g * kHeadDim + 32 * i + 8 * q)
                  : uint4{0, 0, 0, 0};
    }
  }
};

__device__ inline std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ inline std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}
__device__ inline float column_max(float x) {  // over the 8 lanes of equal q
  for (int offset = 4; offset < 32; offset *= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, offset));
  return x;
}
__device__ inline float column_sum(float x) {
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0U, x, offset);
  return x;
}

template <typename T, int kHeadDim>
__device__ void logits_of(const BlockTile<kHeadDim>& tile, const QueryTile<T, kHeadDim>& query,
                          float (&logits)[4]) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    mma<T>(logits, tile.k[0][i].x, tile.k[1][i].x, tile.k[0][i].y, tile.k[1][i].y, query.q8[i].x,
           query.q8[i].y);
    mma<T>(logits, tile.k[0][i].z, tile.k[1][i].z, tile.k[0][i].w, tile.k[1][i].w, query.q8[i].z,
           query.q8[i].w);
  }
}

// Output tile t of 64-element part i has elements 64 i + 8 g + 2 t and + 1 in rows g and g + 8.
template <typename T, int kHeadDim>
__device__ void add_values(const BlockTile<kHeadDim>& tile, std::uint32_t p_low,
                           std::uint32_t p_high, Accumulator<kHeadDim>& acc) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 64; ++i) {
    const auto word = [&](int token, int t) {
      return reinterpret_cast<const std::uint32_t*>(&tile.v[i][token])[t];
    };
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      mma<T>(acc.out[4 * i + t], low_halves(word(0, t), word(1, t)),
             high_halves(word(0, t), word(1, t)), low_halves(word(2, t), word(3, t)),
             high_halves(word(2, t), word(3, t)), p_low, p_high);
    }
  }
}

// One KV block of num_tokens visible tokens into the accumulator. Returns the block's maxima (of
// base 2 logits) for heads 2q and 2q + 1.
template <typename T, int kHeadDim>
__device__ float2 attend(BlockTile<kHeadDim>& tile, const QueryTile<T, kHeadDim>& query,
                         int num_tokens, float scale_log2, int g, int q,
                         Accumulator<kHeadDim>& acc) {
  float logits[4] = {};
  logits_of<T, kHeadDim>(tile, query, logits);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool visible = g + i / 2 * 8 < num_tokens;
    logits[i] = visible ? logits[i] * scale_log2 : kNothing;
  }
  if (num_tokens < kBlockTokens) tile.clear_values_from(num_tokens, q);
  float block_max[2];
  float scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    block_max[h] = column_max(fmaxf(logits[h], logits[h + 2]));
    const float maximum = fmaxf(acc.maximum[h], block_max[h]);
    scale[h] = exp2f(acc.maximum[h] - maximum);
    acc.maximum[h] = maximum;
    logits[h] = exp2f(logits[h] - maximum);
    logits[h + 2] = exp2f(logits[h + 2] - maximum);
    acc.sum[h] = acc.sum[h] * scale[h] + logits[h] + logits[h + 2];
  }
  if (scale[0] != 1.0F || scale[1] != 1.0F) {
#pragma unroll
    for (auto& out : acc.out) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] *= scale[i % 2];
    }
  }
  const std::uint32_t p_low = transpose_8x8(pack<T>(logits[0], logits[1]));
  const std::uint32_t p_high = transpose_8x8(pack<T>(logits[2], logits[3]));
  add_values<T, kHeadDim>(tile, p_low, p_high, acc);
  return {block_max[0], block_max[1]};
}

// Puts parts of softmaxes together that were attended apart: in shared memory, for all threads.
template <int kHeadDim>
struct Merger {
  static constexpr int kQuads = kHeadDim / 4;  // of a head's output
  float factor[kHeads][kMaxParts];             // of a part, under the maximum of all
  float highest[kHeads];
  float weight[kHeads];
  float4 sums[kThreads];

  // part(head, i) is (maximum, sum of weights), values(head, i, quad) four weighted outputs;
  // result(head, quad, sum of values) is called once each, by the threads of the first quads.
  template <typename Part, typename Values, typename Result>
  __device__ void run(int num_heads, int num_parts, Part part, Values values, Result result) {
    if (static_cast<int>(threadIdx.x) / 32 < num_heads) weigh(threadIdx.x / 32, num_parts, part);
    __syncthreads();
    // As many groups of threads as there are share the parts, so that many loads are under way.
    const int quads = num_heads * kQuads;
    const int groups = kThreads / quads;
    const int group = static_cast<int>(threadIdx.x) / quads;
    const int head = static_cast<int>(threadIdx.x) % quads / kQuads;
    const int quad = static_cast<int>(threadIdx.x) % kQuads;
    float4 sum{};
    if (group < groups) {
#pragma unroll 8
      for (int i = group; i < num_parts; i += groups) {
        const float4 value = values(head, i, quad);
        const float scale = factor[head][i];
        sum.x += scale * value.x;
        sum.y += scale * value.y;
        sum.z += scale * value.z;
        sum.w += scale * value.w;
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int i = 1; i < groups; ++i) {
      const float4 more = sums[threadIdx.x + i * quads];
      sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    result(head, quad, sum);
  }

 private:
  // One head's factors, by one warp.
  template <typename Part>
  __device__ void weigh(int head, int num_parts, Part part) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float2 own[kMaxParts / 32];
    float maximum = kNothing;
#pragma unroll
    for (int i = 0; i < kMaxParts / 32; ++i) {
      own[i] = lane + 32 * i < num_parts ? part(head, lane + 32 * i) : float2{kNothing, 0};
      maximum = fmaxf(maximum, own[i].x);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(~0U, maximum, offset));
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxParts / 32; ++i) {
      const float scale = own[i].x == kNothing ? 0.0F : exp2f(own[i].x - maximum);
      if (lane + 32 * i < num_parts) factor[head][lane + 32 * i] = scale;
      sum += scale * own[i].y;
    }
    sum = warp_sum(sum);
    if (lane > 0) return;
    highest[head] = maximum;
    weight[head] = sum;
  }
};

// The warps' results of a block of threads, and what merges them.
template <int kHeadDim>
struct SharedMemory {
  float out[kWarps][kHeads][kHeadDim];
  float2 part[kWarps][kHeads];  // (maximum, sum)
  Merger<kHeadDim> merger;
  bool last;

  __device__ void store(Accumulator<kHeadDim>& acc, int warp, int g, int q) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = 2 * q + h;
      const float sum = column_sum(acc.sum[h]);
      if (g == 0) part[warp][head] = {acc.maximum[h], sum};
#pragma unroll
      for (int t = 0; t < kHeadDim / 16; ++t) {
        const int element = t / 4 * 64 + 8 * g + t % 4 * 2;
        out[warp][head][element] = acc.out[t][h];
        out[warp][head][element + 1] = acc.out[t][h + 2];
      }
    }
  }
};

// Where the shares of (row, query head) lie.
__device__ inline std::size_t share_at(int row, int head, int num_heads, int num_shares,
                                       int share) {
  return (static_cast<std::size_t>(row) * num_heads + head) * num_shares + share;
}

// Four elements of a head's output, weighted until here.
template <typename T>
__device__ void store_result(const Params<T>& p, int row, int head, int head_dim, int quad,
                             float4 sum, float weight, float highest) {
  const std::size_t at = static_cast<std::size_t>(row) * p.num_heads + head;
  const float scale = weight > 0 ? 1 / weight : 0.0F;
  const uint2 packed{pack<T>(sum.x * scale, sum.y * scale), pack<T>(sum.z * scale, sum.w * scale)};
  *reinterpret_cast<uint2*>(p.out + at * head_dim + 4 * quad) = packed;
  if (quad == 0) p.lse[at] = weight > 0 ? (highest + log2f(weight)) / kLog2E : kNothing;
}

// Block maxima of a pass's query heads: [num_heads, num_slots].
struct SlotMaxima {
  float* data;  // null: not wanted
  int num_slots;
  int num_heads;

  __device__ float& at(int head, int slot) const {
    return data[static_cast<std::ptrdiff_t>(head) * num_slots + slot];
  }
  // Of heads 2q and 2q + 1.
  __device__ void write(int slot, int q, float2 value) const {
    if (2 * q < num_heads) at(2 * q, slot) = value.x / kLog2E;
    if (2 * q + 1 < num_heads) at(2 * q + 1, slot) = value.y / kLog2E;
  }
  // Slots from `first` on hold no block; for those who read all of a row.
  __device__ void clear(int first) const {
    for (int head = 0; head < num_heads; ++head) {
      for (int slot = first + threadIdx.x; slot < num_slots; slot += kThreads) {
        at(head, slot) = kNothing;
      }
    }
  }
};

template <typename T>
__device__ SlotMaxima maxima_of(const Params<T>& p, const SequenceKv& kv, int first_head,
                                int num_heads) {
  if (kv.block_max == nullptr) return {};
  return {block_max_of(kv, p.layer, p.num_heads, first_head), kv.num_slots, num_heads};
}

// grid: (shares, KV heads x groups of 8 query heads, rows).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) decode_attention_kernel(const Params<T> p) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SharedMemory<kHeadDim>*>(memory);
  allow_next_kernel();
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 4;
  const int row = blockIdx.z;
  const int kv_head = blockIdx.y % p.num_kv_heads;
  const int skipped = blockIdx.y / p.num_kv_heads * kHeads;  // heads of the group before these
  const int first_head = kv_head * p.group + skipped;
  const int num_heads = min(kHeads, p.group - skipped);

  // None of this changes within a step, so it is read before the step's earlier kernels are done.
  const SequenceKv& kv = p.sequences[row];
  const int num_tokens = *kv.length + 1;
  const int num_slots = min(kv.num_slots, (num_tokens + kBlockTokens - 1) / kBlockTokens);
  const int per_share =
      max(kMinShare, (num_slots + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x));
  const int active_shares = (num_slots + per_share - 1) / per_share;
  const int share = blockIdx.x;
  if (share >= active_shares) return;
  const auto table = static_cast<std::size_t>(p.layer * p.num_kv_heads + kv_head);
  const std::int32_t* slot_to_block = kv.slot_to_block + table * kv.num_slots;
  const T* slots = reinterpret_cast<const T*>(kv.slots + slot_offset(kv, p.layer, kv_head, 0));
  const SlotMaxima maxima = maxima_of(p, kv, first_head, num_heads);
  constexpr int kBlockElements = 2 * kBlockTokens * kHeadDim;

  wait_for_earlier_kernels();

  QueryTile<T, kHeadDim> query;
  query.load(p.q + (static_cast<std::size_t>(row) * p.num_heads + first_head) * kHeadDim, num_heads,
             g, q);
  Accumulator<kHeadDim> acc;
  const int end = min(num_slots, (share + 1) * per_share);
  for (int slot = share * per_share + warp; slot < end; slot += kWarps) {
    BlockTile<kHeadDim> tile;  // of an empty slot too, which is not used: the table is slow to read
    tile.load(slots + static_cast<std::size_t>(slot) * kBlockElements, g, q);
    const int block = slot_to_block[slot];
    float2 block_max{kNothing, kNothing};
    if (block != kAbsent) {
      block_max = attend<T, kHeadDim>(tile, query, num_tokens - block * kBlockTokens, p.scale_log2,
                                      g, q, acc);
    }
    if (maxima.data != nullptr && g == 0) maxima.write(slot, q, block_max);
  }

  if (maxima.data != nullptr && share == active_shares - 1) maxima.clear(num_slots);

  shared.store(acc, warp, g, q);
  __syncthreads();
  Merger<kHeadDim>& merger = shared.merger;
  const auto finish = [&](int head, int quad, float4 sum) {
    store_result(p, row, first_head + head, kHeadDim, quad, sum, merger.weight[head],
                 merger.highest[head]);
  };
  const auto finish_share = [&](int head, int quad, float4 sum) {
    const std::size_t at = share_at(row, first_head + head, p.num_heads, gridDim.x, share);
    *reinterpret_cast<float4*>(p.partial_out + at * kHeadDim + 4 * quad) = sum;
    if (quad == 0) p.partial_sum[at] = {merger.highest[head], merger.weight[head]};
  };
  merger.run(
      num_heads, kWarps, [&](int head, int i) { return shared.part[i][head]; },
      [&](int head, int i, int quad) {
        return *reinterpret_cast<const float4*>(&shared.out[i][head][4 * quad]);
      },
      [&](int head, int quad, float4 sum) {
        active_shares == 1 ? finish(head, quad, sum) : finish_share(head, quad, sum);
      });
  if (active_shares == 1) return;

  // The counter tells who is last; the fences make every share's results visible to them.
  __threadfence();
  __syncthreads();
  std::uint32_t* counter = p.counters + static_cast<std::size_t>(row) * gridDim.y + blockIdx.y;
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(counter, 1) == static_cast<std::uint32_t>(active_shares - 1);
    if (shared.last) *counter = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  const auto first_share = [&](int head) {
    return share_at(row, first_head + head, p.num_heads, gridDim.x, 0);
  };
  merger.run(
      num_heads, active_shares,
      [&](int head, int i) { return __ldcg(&p.partial_sum[first_share(head) + i]); },
      [&](int head, int i, int quad) {
        const float* out = p.partial_out + (first_share(head) + i) * kHeadDim + 4 * quad;
        return __ldcg(reinterpret_cast<const float4*>(out));
      },
      finish);
}

// As many shares as fill the device once.
int shares_for(int work_items) {
  static const int sms = num_sms();
  return std::clamp(sms / work_items, 1, kMaxParts);
}

template <typename T, int kHeadDim>
void run(const DecodeAttentionArgs& args, CudaStream& stream) {
  const int group = args.num_heads / args.num_kv_heads;
  const int passes = (group + kHeads - 1) / kHeads;
  const int shares = shares_for(args.rows * args.num_kv_heads * passes);
  FT_CHECK(args.rows * args.num_kv_heads * passes <= CudaStream::kNumCounters, args.rows);
  const std::size_t parts = static_cast<std::size_t>(args.rows) * args.num_heads * shares;
  std::byte* scratch = stream.scratch(parts * (kHeadDim * sizeof(float) + sizeof(float2)));
  const Params<T> params{static_cast<const T*>(args.q),
                         args.sequences,
                         args.layer,
                         args.num_heads,
                         args.num_kv_heads,
                         group,
                         args.scale * kLog2E,
                         static_cast<T*>(args.out),
                         args.lse,
                         reinterpret_cast<float*>(scratch),
                         reinterpret_cast<float2*>(scratch + parts * kHeadDim * sizeof(float)),
                         stream.counters()};
  const auto kernel = decode_attention_kernel<T, kHeadDim>;
  constexpr int kShared = sizeof(SharedMemory<kHeadDim>);
  FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  launch_overlapped(kernel, dim3(shares, args.num_kv_heads * passes, args.rows), kThreads, kShared,
                    stream, params);
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream) {
  if (args.rows == 0) return;
  FT_CHECK(args.num_heads % args.num_kv_heads == 0, args.num_heads, args.num_kv_heads);
  FT_CHECK(args.head_dim == 64 || args.head_dim == 128, args.head_dim);
  FT_CHECK(args.block_max == nullptr);
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.head_dim == 64 ? run<T, 64>(args, stream) : run<T, 128>(args, stream);
  });
}

}  // namespace foretoken::kernels::cuda
