// streamed_attention: one query a sequence over all its blocks, those without a slot read straight
// from the arena. Bound by the host link, so its arithmetic is plain: fp32 on CUDA cores.
//
// A CTA takes a share of one (row, KV head)'s blocks, its warps a block in turn. A warp has the
// whole block in registers, loaded as it lies in memory (the link likes whole lines): the 8
// elements of a lane belong to one token for each load, and to the same dims for all. So a lane
// that has its tokens' scores has all it needs for its part of the weighted sum of values. All
// query heads of the KV head go over the registers; the softmax is online, to base 2. Shares are
// merged by a second kernel.
//
// sketched_attention is the same kernel over sketches in device memory: they are turned into the
// keys they stand for, in those registers.
#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/checksum.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/types.cuh"
#include "kernels/key_sketch.h"
#include "kernels/model_limits.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kCtas = 264;  // of all rows and heads, about: two an SM

// What of a block is used: all of it, its keys, or its keys' sketch where it has no slot.
enum class Reads { kBlock, kKeys, kSketch };

// A share's softmax of one query head, not yet normalized: its weights' maximum and sum.
struct PartialSum {
  float maximum;
  float sum;
};

template <typename T>
struct Params {
  DecodeAttentionArgs args;
  int num_shares;
  float* partial_out;        // [rows, num_heads, num_shares, head_dim]
  PartialSum* partial_sums;  // [rows, num_heads, num_shares]
};

__device__ inline std::size_t share_index(const DecodeAttentionArgs& args, int row, int head,
                                          int num_shares, int share) {
  return (static_cast<std::size_t>(row) * args.num_heads + head) * num_shares + share;
}

// How a warp's loads of half a block (K or V) fall on its lanes.
template <int kHeadDim>
struct Layout {
  static constexpr int kLanesPerToken = kHeadDim / 8;
  static constexpr int kTokensPerLoad = 32 / kLanesPerToken;
  static constexpr int kLoads = kBlockTokens / kTokensPerLoad;  // of a lane
  static constexpr int kHalfPairs = kBlockTokens * kLanesPerToken;
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int token(int load) { return load * kTokensPerLoad + lane() / kLanesPerToken; }
  __device__ static int first_dim() { return lane() % kLanesPerToken * 8; }
};

// Combines over the lanes that share a token, or over those that share their dims.
template <int kLanesPerToken>
__device__ float sum_of_token(float x) {
  for (int offset = 1; offset < kLanesPerToken; offset *= 2) {
    x += __shfl_xor_sync(~0U, x, offset);
  }
  return x;
}
template <int kLanesPerToken>
__device__ float sum_over_tokens(float x) {
  for (int offset = kLanesPerToken; offset < 32; offset *= 2) {
    x += __shfl_xor_sync(~0U, x, offset);
  }
  return x;
}
template <int kLanesPerToken>
__device__ float max_over_tokens(float x) {
  for (int offset = kLanesPerToken; offset < 32; offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0U, x, offset));
  }
  return x;
}

// Eight codes and eight steps of a sketch, loaded at once.
struct alignas(16) Words8 {
  std::uint32_t v[8];
};
struct alignas(8) Bytes8 {
  std::uint8_t v[8];
};

// A block in the registers of a warp.
template <typename T, int kHeadDim, Reads kReads>
struct BlockRegisters {
  using L = Layout<kHeadDim>;
  static constexpr bool kValues = kReads == Reads::kBlock;
  WordPair k[L::kLoads];
  WordPair v[kValues ? L::kLoads : 1];

  __device__ void load(const WordPair* block) {
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) k[i] = __ldcs(block + 32 * i + L::lane());
    if constexpr (kValues) {
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        v[i] = __ldcs(block + L::kHalfPairs + 32 * i + L::lane());
      }
    }
  }
  // The keys that a sketch stands for. A lane's dims are the same for all its tokens.
  __device__ void restore(const std::byte* sketch) {
    const int dim = L::first_dim();
    const auto codes = *reinterpret_cast<const Words8*>(sketch + sizeof(std::uint32_t) * dim);
    const auto low =
        *reinterpret_cast<const Vec8<T>*>(sketch + sketch_low_offset(kHeadDim) + sizeof(T) * dim);
    const auto step = *reinterpret_cast<const Bytes8*>(sketch + sketch_step_offset(kHeadDim) + dim);
    Vec8<T> keys[L::kLoads];
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      const float first = to_float(low.v[d]);
      const float width = __half2float(__ushort_as_half(half_from_step(step.v[d])));
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) {
        const std::uint32_t level = codes.v[d] >> 2 * L::token(i) & 3U;
        keys[i].v[d] = from_float<T>(key_of_level(level, first, width));
      }
    }
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) k[i] = *reinterpret_cast<const WordPair*>(&keys[i]);
  }
  // Of block `index`, which lies at `block`: values that aren't here are read for this alone.
  __device__ std::uint64_t checksum(const WordPair* block, int layer, int index) const {
    std::uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      const int at = L::kHalfPairs + 32 * i + L::lane();
      sum += mix_pair(k[i], 32 * i + L::lane());
      sum += mix_pair(kValues ? v[kValues ? i : 0] : __ldcs(block + at), at);
    }
    return finish_checksum(warp_sum_words(sum), layer, index);
  }
  // Rows past the last token may hold anything, NaN too: they count as zero.
  __device__ void clear_values_from(int num_tokens) {
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      if (L::token(i) >= num_tokens) v[i] = WordPair{0, 0};
    }
  }
};

template <typename T>
__device__ float element(const WordPair& pair, int i) {
  return to_float(reinterpret_cast<const T*>(&pair)[i]);
}

// One warp's softmax: of head h, lane h has the maximum and the sum, `out` the weighted values.
template <typename T, int kHeadDim, Reads kReads>
class WarpAttention {
 public:
  using L = Layout<kHeadDim>;
  using Registers = BlockRegisters<T, kHeadDim, kReads>;
  static constexpr bool kValues = Registers::kValues;
  // q, out: [group, kHeadDim] shared; q is of the CTA, and scaled; out is this warp's, and zero.
  __device__ WarpAttention(const float* q, float* out, int group)
      : q_(q), out_(out), group_(group) {}

  // block_max: of the group's first head and this block, or null.
  __device__ void attend(Registers& block, int num_tokens, float* block_max, int pitch) {
    if constexpr (kValues) block.clear_values_from(num_tokens);
    for (int head = 0; head < group_; ++head) {
      float weights[L::kLoads];
      score(block, head, num_tokens, weights);
      float highest = kNothing;
#pragma unroll
      for (const float logit : weights) highest = fmaxf(highest, logit);
      highest = max_over_tokens<L::kLanesPerToken>(highest);
      if (block_max != nullptr && L::lane() == 0) {
        block_max[static_cast<std::size_t>(head) * pitch] = highest / kLog2E;
      }
      const float before = __shfl_sync(~0U, maximum_, head);
      const float maximum = fmaxf(before, highest);
      const float shrink = scale_of(before, maximum);
      float sum = 0;
#pragma unroll
      for (float& weight : weights) sum += weight = exp2f(weight - maximum);
      sum = sum_over_tokens<L::kLanesPerToken>(sum);
      if (L::lane() == head) {
        maximum_ = maximum;
        sum_ = sum_ * shrink + sum;
      }
      if constexpr (kValues) add_values(block, head, weights, shrink);
    }
  }
  __device__ PartialSum partial() const { return {maximum_, sum_}; }

 private:
  // logits[i]: of token(i) and this head, to base 2.
  __device__ void score(const Registers& block, int head, int num_tokens,
                        float (&logits)[L::kLoads]) const {
    const float* q = q_ + head * kHeadDim + L::first_dim();
    float query[8];
#pragma unroll
    for (int d = 0; d < 8; ++d) query[d] = q[d];
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      float dot = 0;
#pragma unroll
      for (int d = 0; d < 8; ++d) dot += query[d] * element<T>(block.k[i], d);
      dot = sum_of_token<L::kLanesPerToken>(dot);
      logits[i] = L::token(i) < num_tokens ? dot : kNothing;
    }
  }
  __device__ void add_values(const Registers& block, int head, const float (&weights)[L::kLoads],
                             float shrink) {
    float* out = out_ + head * kHeadDim + L::first_dim();
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      float value = 0;
#pragma unroll
      for (int i = 0; i < L::kLoads; ++i) value += weights[i] * element<T>(block.v[i], d);
      value = sum_over_tokens<L::kLanesPerToken>(value);
      if (L::lane() < L::kLanesPerToken) out[d] = out[d] * shrink + value;
    }
  }

  const float* q_;
  float* out_;
  int group_;
  float maximum_ = kNothing;
  float sum_ = 0;
};

// A block of the sequence from its slot, or from its sketch, or from the arena and verified. False:
// it is not what was written, and counted.
template <typename T, int kHeadDim, Reads kReads>
__device__ bool load_block(const DecodeAttentionArgs& args, const SequenceKv& kv, int kv_head,
                           int block, BlockRegisters<T, kHeadDim, kReads>& registers) {
  const int layer = args.layer;
  const int slot = block_to_slot(kv, layer, kv_head)[block];
  if (slot != kAbsent) {
    registers.load(
        reinterpret_cast<const WordPair*>(kv.slots + slot_offset(kv, layer, kv_head, slot)));
    return true;
  }
  if constexpr (kReads == Reads::kSketch) {
    registers.restore(kv.sketches + sketch_offset(kv, layer, kv_head, block));
    return true;
  }
  const auto* data = reinterpret_cast<const WordPair*>(arena_block(kv, layer, kv_head, block));
  bool good = data != nullptr;
  if (good) {
    const std::uint64_t expected = *checksum_of(kv, layer, kv_head, block);
    registers.load(data);
    good = registers.checksum(data, layer, block) == expected;
  }
  if (!good && threadIdx.x % 32 == 0) atomicAdd(kv.mismatches, 1U);
  return good;
}

// Shared memory of a CTA: q [group, head_dim] | sums [kWarps, group] | out [kWarps, group,
// head_dim].
struct SharedParts {
  float* q;
  PartialSum* sums;
  float* out;
  __device__ SharedParts(float* memory, int group, int head_dim)
      : q(memory),
        sums(reinterpret_cast<PartialSum*>(memory + group * head_dim)),
        out(memory + group * head_dim + 2 * kWarps * group) {}
};
std::size_t shared_bytes(int group, int head_dim, bool values) {
  const int floats =
      group * head_dim + 2 * kWarps * group + (values ? kWarps * group * head_dim : 0);
  return sizeof(float) * static_cast<std::size_t>(floats);
}

// The warps' results of a CTA into its share.
template <typename T, int kHeadDim, bool kValues>
__device__ void store_share(const Params<T>& p, const SharedParts& shared, int group, int row,
                            int first_head) {
  for (int i = threadIdx.x; i < group * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim;
    float highest = kNothing;
    for (int w = 0; w < kWarps; ++w)
      highest = fmaxf(highest, shared.sums[w * group + head].maximum);
    float value = 0;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const PartialSum& part = shared.sums[w * group + head];
      const float weight = scale_of(part.maximum, highest);
      sum += weight * part.sum;
      if constexpr (kValues) value += weight * shared.out[w * group * kHeadDim + i];
    }
    const std::size_t at =
        share_index(p.args, row, first_head + head, p.num_shares, static_cast<int>(blockIdx.x));
    if constexpr (kValues) p.partial_out[at * kHeadDim + i % kHeadDim] = value;
    if (i % kHeadDim == 0) p.partial_sums[at] = {highest, sum};
  }
}

// grid: (shares, KV heads, rows).
template <typename T, int kHeadDim, Reads kReads>
__global__ void __launch_bounds__(kThreads) streamed_attention_kernel(Params<T> p) {
  constexpr bool kValues = kReads == Reads::kBlock;
  extern __shared__ __align__(16) float memory[];
  const DecodeAttentionArgs& args = p.args;
  const int row = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int share = static_cast<int>(blockIdx.x);
  const int group = args.num_heads / args.num_kv_heads;
  const int first_head = kv_head * group;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const SharedParts shared(memory, group, kHeadDim);
  const SequenceKv kv = args.sequences[row];
  const int length = *kv.length;
  const int num_blocks = length / kBlockTokens + 1;
  require(num_blocks <= args.pitch || args.block_max == nullptr);
  require(kReads != Reads::kSketch || kv.sketches != nullptr);
  require(block_to_slot(kv, args.layer, kv_head)[num_blocks - 1] != kAbsent);  // the open block

  const auto* q = static_cast<const T*>(args.q) +
                  (static_cast<std::size_t>(row) * args.num_heads + first_head) * kHeadDim;
  for (int i = threadIdx.x; i < group * kHeadDim; i += kThreads) {
    shared.q[i] = to_float(q[i]) * (args.scale * kLog2E);
    for (int w = 0; kValues && w < kWarps; ++w) shared.out[w * group * kHeadDim + i] = 0;
  }
  __syncthreads();

  float* block_max = args.block_max;
  if (block_max != nullptr) {
    block_max += (static_cast<std::size_t>(row) * args.num_heads + first_head) * args.pitch;
  }
  WarpAttention<T, kHeadDim, kReads> attention(shared.q, shared.out + warp * group * kHeadDim,
                                               group);
  const int step = p.num_shares * kWarps;
  for (int block = share * kWarps + warp; block < num_blocks; block += step) {
    BlockRegisters<T, kHeadDim, kReads> registers;
    if (load_block<T, kHeadDim, kReads>(p.args, kv, kv_head, block, registers)) {
      const int num_tokens = min(kBlockTokens, length + 1 - block * kBlockTokens);
      attention.attend(registers, num_tokens, block_max == nullptr ? nullptr : block_max + block,
                       args.pitch);
    } else if (block_max != nullptr && Layout<kHeadDim>::lane() < group) {
      block_max[static_cast<std::size_t>(Layout<kHeadDim>::lane()) * args.pitch + block] = kNothing;
    }
  }
  for (int i = share * kThreads + static_cast<int>(threadIdx.x);
       block_max != nullptr && i < group * (args.pitch - num_blocks);
       i += p.num_shares * kThreads) {
    const int head = i / (args.pitch - num_blocks);
    const int column = num_blocks + i % (args.pitch - num_blocks);
    block_max[static_cast<std::size_t>(head) * args.pitch + column] = kNothing;
  }
  if (Layout<kHeadDim>::lane() < group) {
    shared.sums[warp * group + Layout<kHeadDim>::lane()] = attention.partial();
  }
  __syncthreads();
  store_share<T, kHeadDim, kValues>(p, shared, group, row, first_head);
}

// The shares of one query head. grid: (num_heads, rows); a thread a dim.
template <typename T>
__global__ void merge_shares_kernel(Params<T> p) {
  const DecodeAttentionArgs& args = p.args;
  const int head = static_cast<int>(blockIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  const std::size_t first = share_index(args, row, head, p.num_shares, 0);
  float highest = kNothing;
  for (int s = 0; s < p.num_shares; ++s)
    highest = fmaxf(highest, p.partial_sums[first + s].maximum);
  float value = 0;
  float sum = 0;
  for (int s = 0; s < p.num_shares; ++s) {
    const PartialSum part = p.partial_sums[first + s];
    const float weight = scale_of(part.maximum, highest);
    sum += weight * part.sum;
    if (args.out != nullptr) {
      value += weight * p.partial_out[(first + s) * args.head_dim + threadIdx.x];
    }
  }
  const std::size_t at = static_cast<std::size_t>(row) * args.num_heads + head;
  if (args.out != nullptr) {
    static_cast<T*>(args.out)[at * args.head_dim + threadIdx.x] =
        from_float<T>(sum > 0 ? value / sum : 0.0F);
  }
  if (threadIdx.x == 0) args.lse[at] = sum > 0 ? (highest + log2f(sum)) / kLog2E : kNothing;
}

template <typename T, int kHeadDim, Reads kReads>
void launch(const DecodeAttentionArgs& args, CudaStream& stream) {
  constexpr bool kValues = kReads == Reads::kBlock;
  const int shares = std::max(1, kCtas / (args.rows * args.num_kv_heads));
  const std::size_t parts = static_cast<std::size_t>(args.rows) * args.num_heads * shares;
  std::byte* scratch =
      stream.scratch(parts * (sizeof(PartialSum) + (kValues ? kHeadDim * sizeof(float) : 0)));
  const Params<T> params{args, shares,
                         reinterpret_cast<float*>(scratch + parts * sizeof(PartialSum)),
                         reinterpret_cast<PartialSum*>(scratch)};
  const auto kernel = streamed_attention_kernel<T, kHeadDim, kReads>;
  const std::size_t shared = shared_bytes(args.num_heads / args.num_kv_heads, kHeadDim, kValues);
  FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)));
  const dim3 ctas(static_cast<unsigned>(shares), static_cast<unsigned>(args.num_kv_heads),
                  static_cast<unsigned>(args.rows));
  kernel<<<ctas, kThreads, shared, stream.handle()>>>(params);
  FT_CUDA(cudaGetLastError());
  const dim3 heads(static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.rows));
  merge_shares_kernel<T><<<heads, kHeadDim, 0, stream.handle()>>>(params);
  FT_CUDA(cudaGetLastError());
}

template <Reads kReads>
void run(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream) {
  if (args.rows == 0) return;
  FT_CHECK(args.num_heads % args.num_kv_heads == 0, args.num_heads, args.num_kv_heads);
  FT_CHECK(args.num_heads / args.num_kv_heads <= kMaxGroup, args.num_heads, args.num_kv_heads);
  FT_CHECK(args.head_dim == 64 || args.head_dim == 128, args.head_dim);
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.head_dim == 64 ? launch<T, 64, kReads>(args, stream)
                        : launch<T, 128, kReads>(args, stream);
  });
}

}  // namespace

void streamed_attention(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream) {
  args.out == nullptr ? run<Reads::kKeys>(args, activation, stream)
                      : run<Reads::kBlock>(args, activation, stream);
}

void sketched_attention(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.out == nullptr);
  run<Reads::kSketch>(args, activation, stream);
}

}  // namespace foretoken::kernels::cuda
