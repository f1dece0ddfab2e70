// decode_attention: one query a sequence over its resident blocks, bound by reading K and V once.
//
// A block of threads takes a share of one (row, KV head)'s slots; its 16 warps take a slot in turn.
// All shares are about as long, of long contexts and short ones alike, so that they end together.
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
// sums, the warps meet in shared memory, and the shares meet in the block of the last one, which
// awaits their words (CudaStream::mailbox): no fence, no counter. Blocks start in the order of
// their numbers, so those that it awaits never wait for its end.
//
// The kernel before, rope_decode, changes nothing of KV but the open block: a warp's first block is
// on its way before that is done. What changes other slots, or the table, is done before this
// kernel starts: it is joined, or lets nothing overlap (CudaStream::serialize_next).
#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/loads.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeads = 8;          // query heads that share a pass
constexpr int kMinShare = kWarps;  // slots; fewer are not worth another merge
constexpr int kShareCost = 16;     // what a share takes beside its slots, in slots (guessed)
constexpr int kMaxWaves = 2;       // of shares that are more than one a (row, KV head)

template <typename T>
struct Params {
  const T* q;
  const SequenceKv* sequences;
  int rows;
  int layer;
  int num_heads;
  int num_kv_heads;
  int group;  // query heads a KV head
  int items;  // of a row: KV heads, once for each 8 of their query heads
  int sms;
  float scale_log2;
  T* out;
  float* lse;
  // Of shares, in the stream's mailbox:
  float4* share_out;   // [CTAs, kHeads, head_dim / 4]
  float2* share_part;  // [CTAs, kHeads] (maximum, sum)
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

  // from(address) loads 16 bytes.
  template <typename T, typename Load>
  __device__ void load(const T* block, int g, int q, Load from) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      k[0][i] = from(block + g * kHeadDim + 32 * i + 8 * q);
      k[1][i] = from(block + (g + 8) * kHeadDim + 32 * i + 8 * q);
    }
    const T* values = block + kBlockTokens * kHeadDim;
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token = 2 * q + t % 2 + t / 2 * 8;
        v[i][t] = from(values + token * kHeadDim + 64 * i + 8 * g);
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

__device__ inline void add_scaled(float4& sum, float scale, float4 value) {
  sum.x += scale * value.x;
  sum.y += scale * value.y;
  sum.z += scale * value.z;
  sum.w += scale * value.w;
}

// A softmax's part: four weighted outputs, their weights' sum, and the maximum that both are under.
struct Part {
  float maximum = kNothing;
  float weight = 0;
  float4 sum{};

  __device__ void add(float2 other, float4 values) {
    const float higher = fmaxf(maximum, other.x);
    const float scale = scale_of(maximum, higher);
    const float others_scale = scale_of(other.x, higher);
    maximum = higher;
    weight = scale * weight + others_scale * other.y;
    sum = {scale * sum.x, scale * sum.y, scale * sum.z, scale * sum.w};
    add_scaled(sum, others_scale, values);
  }
};

// Puts the warps' parts of softmaxes together: in shared memory, for all threads.
template <int kHeadDim>
struct Merger {
  static constexpr int kQuads = kHeadDim / 4;  // of a head's output
  float factor[kHeads][kWarps];                // of a part, under the maximum of all
  float highest[kHeads];
  float weight[kHeads];
  float4 sums[kThreads];

  // part(head, i) is (maximum, sum of weights), values(head, i, quad) four weighted outputs;
  // result(head, quad, sum of values) is called once each, by the threads of the first quads.
  template <typename Part, typename Values, typename Result>
  __device__ void run(int num_heads, Part part, Values values, Result result) {
    if (static_cast<int>(threadIdx.x) / 32 < num_heads) weigh(threadIdx.x / 32, part);
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
      for (int i = group; i < kWarps; i += groups)
        add_scaled(sum, factor[head][i], values(head, i, quad));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int i = 1; i < groups; ++i) add_scaled(sum, 1, sums[threadIdx.x + i * quads]);
    result(head, quad, sum);
  }

 private:
  // One head's factors, by one warp.
  template <typename Part>
  __device__ void weigh(int head, Part part) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float2 own = lane < kWarps ? part(head, lane) : float2{kNothing, 0};
    const float maximum = warp_max(own.x);
    const float scale = scale_of(own.x, maximum);
    if (lane < kWarps) factor[head][lane] = scale;
    const float sum = warp_sum(scale * own.y);
    if (lane > 0) return;
    highest[head] = maximum;
    weight[head] = sum;
  }
};

// ---- shares ----

// Slots of a row that hold tokens, the step's included.
__device__ int slots_of(const SequenceKv& kv) {
  return min(kv.num_slots, (*kv.length + kBlockTokens) / kBlockTokens);
}

// Shares of a row's item that are to have 1 / inverse slots; a few more do no harm.
__device__ int shares_of(int slots, float inverse) {
  return max(1, static_cast<int>(ceilf(static_cast<float>(slots) * inverse - 0.001F)));
}

// A CTA's: slots [begin, end) of an item, a pass of a row's KV head.
struct Share {
  int row;
  int item;
  int begin;
  int end;
  int num_slots;  // of the row
  int index;      // among the item's
  int count;

  __device__ bool is_last() const { return index == count - 1; }
};

// Each lane tries a number of shares for the longest row, and so a length for all. Returns the
// inverse of the length with which the device takes least, if all its SMs take a share at a time.
// By one warp.
__device__ float best_inverse(const int* slots, int rows, int items, int sms) {
  const auto lane = static_cast<int>(threadIdx.x);
  int longest = 0;
  for (int row = lane; row < rows; row += 32) longest = max(longest, slots[row]);
  longest = __reduce_max_sync(~0U, longest);
  const int tried = lane < 16 ? lane + 1 : 8 * (lane - 13);
  const int most = max(kMinShare, (longest + tried - 1) / tried);
  const float inverse = 1.0F / static_cast<float>(most);
  int ctas = 0;
  for (int row = 0; row < rows; ++row) ctas += shares_of(slots[row], inverse);
  ctas *= items;
  const int waves = (ctas + sms - 1) / sms;
  const unsigned cost = ctas > static_cast<int>(gridDim.x) ? ~0U >> 5 : waves * (most + kShareCost);
  const unsigned best = __reduce_min_sync(~0U, cost << 5 | lane);
  return __shfl_sync(~0U, inverse, best % 32);
}

// This CTA's share into `mine`; none has count 0. slots: [rows] scratch, shared. All threads call
// it; a barrier makes it visible.
__device__ void find_share(const SequenceKv* sequences, int rows, int items, int sms, int* slots,
                           Share& mine) {
  for (int row = threadIdx.x; row < rows; row += kThreads) slots[row] = slots_of(sequences[row]);
  if (threadIdx.x == 0) mine.count = 0;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const float inverse = best_inverse(slots, rows, items, sms);
  const auto cta = static_cast<int>(blockIdx.x);
  int ctas = 0;  // of rows before
  for (int base = 0; base < rows && ctas <= cta; base += 32) {
    const int row = base + static_cast<int>(threadIdx.x);
    const int shares = row < rows ? shares_of(slots[row], inverse) : 0;
    const int until = ctas + warp_inclusive_sum(shares * items);
    const int place = cta - (until - shares * items);
    if (0 <= place && cta < until) {
      const int per_share = max(kMinShare, (slots[row] + shares - 1) / shares);
      const int index = place % shares;
      const int count = (slots[row] + per_share - 1) / per_share;
      if (index < count) {
        mine = {row,
                place / shares,
                index * per_share,
                min(slots[row], (index + 1) * per_share),
                slots[row],
                index,
                count};
      }
    }
    ctas = __shfl_sync(~0U, until, 31);
  }
}

// The warps' results of a block of threads, and what merges them.
template <int kHeadDim>
struct SharedMemory {
  // A lane stores pairs of heads 2q and 2q + 1, which lie at q and q + 4: with this stride no two
  // of 16 lanes meet in a bank.
  static constexpr int kStride = kHeadDim + 2;
  static_assert(kStride / 2 % 2 == 1);
  float out[kWarps][kHeads][kStride];
  float2 part[kWarps][kHeads];  // (maximum, sum)
  Merger<kHeadDim> merger;
  Part parts[kThreads];
  Share share;

  __device__ void store(Accumulator<kHeadDim>& acc, int num_heads, int warp, int g, int q) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = 2 * q + h;
      const float sum = column_sum(acc.sum[h]);
      if (g == 0) part[warp][head] = {acc.maximum[h], sum};
      if (head >= num_heads) continue;
#pragma unroll
      for (int t = 0; t < kHeadDim / 16; ++t) {
        const int element = t / 4 * 64 + 8 * g + t % 4 * 2;
        *reinterpret_cast<float2*>(&out[warp][q + 4 * h][element]) = {acc.out[t][h],
                                                                      acc.out[t][h + 2]};
      }
    }
  }
  __device__ float4 values(int warp, int head, int quad) const {
    const auto* from =
        reinterpret_cast<const float2*>(&out[warp][head / 2 + head % 2 * 4][4 * quad]);
    return {from[0].x, from[0].y, from[1].x, from[1].y};
  }
};

// ---- shares meet ----

// No result is: that which isn't a number is 0x7FFFFFFF, whatever it was made of.
__device__ inline bool is_empty(float word) { return __float_as_uint(word) == CudaStream::kEmpty; }
__device__ inline bool is_empty(float2 words) { return is_empty(words.x) || is_empty(words.y); }
__device__ inline bool is_empty(float4 words) {
  return is_empty(words.x) || is_empty(words.y) || is_empty(words.z) || is_empty(words.w);
}
template <typename Words>
__device__ void await(Words& words, const Words* from) {
  while (is_empty(words)) words = load_awaited(from);
}
template <typename Words>
__device__ void set_empty(Words* words) {
  static_assert(sizeof(Words) % sizeof(uint2) == 0);
  for (auto* at = reinterpret_cast<uint2*>(words); at < reinterpret_cast<uint2*>(words + 1); ++at) {
    *at = {CudaStream::kEmpty, CudaStream::kEmpty};
  }
}

// An item's shares, as they come. All threads call it; result(head, quad, part) as the Merger's.
// parts: [kThreads] scratch, shared. first_cta: of the item's first share.
template <int kHeadDim, typename T, typename Result>
__device__ void merge_shares(const Params<T>& p, std::size_t first_cta, int count, int num_heads,
                             Part* parts, Result result) {
  constexpr int kQuads = kHeadDim / 4;
  constexpr int kInFlight = 4;
  const int quads = num_heads * kQuads;
  const int groups = kThreads / quads;
  const int group = static_cast<int>(threadIdx.x) / quads;
  const int head = static_cast<int>(threadIdx.x) % quads / kQuads;
  const int quad = static_cast<int>(threadIdx.x) % kQuads;
  Part part;
  for (int base = group; group < groups && base < count; base += groups * kInFlight) {
    float2 others[kInFlight];
    float4 values[kInFlight];
    const auto head_of = [&](int i) { return (first_cta + base + i * groups) * kHeads + head; };
    const auto has = [&](int i) { return base + i * groups < count; };
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!has(i)) break;
      others[i] = load_awaited(p.share_part + head_of(i));
      values[i] = load_awaited(p.share_out + head_of(i) * kQuads + quad);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!has(i)) break;
      float4* from = p.share_out + head_of(i) * kQuads + quad;
      await(others[i], p.share_part + head_of(i));
      await(values[i], from);
      set_empty(from);
      part.add(others[i], values[i]);
    }
  }
  parts[threadIdx.x] = part;
  __syncthreads();
  for (int i = threadIdx.x; i < count * num_heads; i += kThreads) {
    set_empty(p.share_part + (first_cta + i / num_heads) * kHeads + i % num_heads);
  }
  if (group > 0) return;
  for (int i = 1; i < groups; ++i) {
    const Part& other = parts[threadIdx.x + i * quads];
    part.add({other.maximum, other.weight}, other.sum);
  }
  result(head, quad, part);
}

// Four elements of a head's output.
template <typename T>
__device__ void store_result(const Params<T>& p, int row, int head, int head_dim, int quad,
                             const Part& part) {
  const std::size_t at = static_cast<std::size_t>(row) * p.num_heads + head;
  const bool any = part.weight > 0;
  const float scale = any ? 1 / part.weight : 0.0F;
  const float4 sum = part.sum;
  const uint2 packed{pack<T>(sum.x * scale, sum.y * scale), pack<T>(sum.z * scale, sum.w * scale)};
  *reinterpret_cast<uint2*>(p.out + at * head_dim + 4 * quad) = packed;
  if (quad == 0) p.lse[at] = any ? (part.maximum + log2f(part.weight)) / kLog2E : kNothing;
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

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) decode_attention_kernel(const Params<T> p) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SharedMemory<kHeadDim>*>(memory);
  allow_next_kernel();
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 4;

  // None of this changes within a step, so it is read before the step's earlier kernels are done.
  find_share(p.sequences, p.rows, p.items, p.sms, reinterpret_cast<int*>(&shared + 1),
             shared.share);
  __syncthreads();
  const Share& share = shared.share;
  if (share.count == 0) return;
  const int row = share.row;
  const int kv_head = share.item % p.num_kv_heads;
  const int skipped = share.item / p.num_kv_heads * kHeads;  // heads of the group before these
  const int first_head = kv_head * p.group + skipped;
  const int num_heads = min(kHeads, p.group - skipped);
  const SequenceKv& kv = p.sequences[row];
  const int num_tokens = *kv.length + 1;
  const std::int32_t* blocks = slot_to_block(kv, p.layer, kv_head);
  const T* slots = reinterpret_cast<const T*>(kv.slots + slot_offset(kv, p.layer, kv_head, 0));
  const SlotMaxima maxima = maxima_of(p, kv, first_head, num_heads);
  constexpr int kBlockElements = 2 * kBlockTokens * kHeadDim;

  const auto once = [](const T* from) { return load_once(from); };
  BlockTile<kHeadDim> tile;  // of an empty slot too, which is not used: the table is slow to read
  int block = kAbsent;
  int slot = share.begin + warp;
  const T* at = slots + static_cast<std::size_t>(slot) * kBlockElements;
  if (slot < share.end) {
    tile.load(at, g, q, once);
    block = blocks[slot];
  }

  if (share.count > 1 && share.is_last()) {  // what the shares will write, and this one awaits
    const std::size_t first = blockIdx.x - static_cast<std::size_t>(share.index);
    const std::size_t heads = static_cast<std::size_t>(share.count) * kHeads;
    prefetch(p.share_out + first * kHeads * (kHeadDim / 4), heads * kHeadDim * sizeof(float));
    prefetch(p.share_part + first * kHeads, heads * sizeof(float2));
  }

  wait_for_earlier_kernels();

  if (block == (num_tokens - 1) / kBlockTokens) {  // the step's k and v have come
    tile.load(at, g, q, [](const T* from) { return __ldcg(reinterpret_cast<const uint4*>(from)); });
  }
  QueryTile<T, kHeadDim> query;
  query.load(p.q + (static_cast<std::size_t>(row) * p.num_heads + first_head) * kHeadDim, num_heads,
             g, q);
  Accumulator<kHeadDim> acc;
  while (slot < share.end) {
    float2 block_max{kNothing, kNothing};
    if (block != kAbsent) {
      block_max = attend<T, kHeadDim>(tile, query, num_tokens - block * kBlockTokens, p.scale_log2,
                                      g, q, acc);
    }
    if (maxima.data != nullptr && g == 0) maxima.write(slot, q, block_max);
    slot += kWarps;
    at += kWarps * kBlockElements;
    if (slot >= share.end) break;
    tile.load(at, g, q, once);
    block = blocks[slot];
  }

  if (maxima.data != nullptr && share.is_last()) maxima.clear(share.num_slots);

  shared.store(acc, num_heads, warp, g, q);
  __syncthreads();
  const auto finish = [&](int head, int quad, const Part& part) {
    store_result(p, row, first_head + head, kHeadDim, quad, part);
  };
  const auto send = [&](int head, int quad, const Part& part) {
    const std::size_t at = static_cast<std::size_t>(blockIdx.x) * kHeads + head;
    p.share_out[at * (kHeadDim / 4) + quad] = part.sum;
    if (quad == 0) p.share_part[at] = {part.maximum, part.weight};
  };
  const Merger<kHeadDim>& merger = shared.merger;
  shared.merger.run(
      num_heads, [&](int head, int i) { return shared.part[i][head]; },
      [&](int head, int i, int quad) { return shared.values(i, head, quad); },
      [&](int head, int quad, float4 sum) {
        const Part part{merger.highest[head], merger.weight[head], sum};
        share.count == 1 ? finish(head, quad, part) : send(head, quad, part);
      });
  if (share.count == 1 || !share.is_last()) return;
  merge_shares<kHeadDim>(p, blockIdx.x - static_cast<std::size_t>(share.index), share.count,
                         num_heads, shared.parts, finish);
}

// One row's shares fill the device once. Of several rows there are more and shorter ones, where
// that evens them out.
int most_shares(int rows, int items, int sms) {
  return rows == 1 ? std::max(sms, items) : rows * items + kMaxWaves * sms;
}

template <typename T, int kHeadDim>
void run(const DecodeAttentionArgs& args, CudaStream& stream) {
  const int group = args.num_heads / args.num_kv_heads;
  const int items = (group + kHeads - 1) / kHeads * args.num_kv_heads;
  static const int sms = num_sms();
  const int ctas = most_shares(args.rows, items, sms);
  const std::size_t parts = static_cast<std::size_t>(ctas) * kHeads;
  constexpr std::size_t kOutBytes = kHeadDim * sizeof(float);
  std::byte* mailbox = stream.mailbox(parts * (kOutBytes + sizeof(float2)));
  const Params<T> params{static_cast<const T*>(args.q),
                         args.sequences,
                         args.rows,
                         args.layer,
                         args.num_heads,
                         args.num_kv_heads,
                         group,
                         items,
                         sms,
                         args.scale * kLog2E,
                         static_cast<T*>(args.out),
                         args.lse,
                         reinterpret_cast<float4*>(mailbox),
                         reinterpret_cast<float2*>(mailbox + parts * kOutBytes)};
  const auto kernel = decode_attention_kernel<T, kHeadDim>;
  const std::size_t bytes =
      sizeof(SharedMemory<kHeadDim>) + sizeof(int) * static_cast<std::size_t>(args.rows);
  FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)));
  launch_overlapped(kernel, ctas, kThreads, bytes, stream, params);
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
