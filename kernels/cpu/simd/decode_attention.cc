#include "kernels/cpu/simd/decode_attention.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd/decode_attention.cc"
#include "kernels/cpu/simd/targets.h"
// Below Highway's choice of targets.
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// Query heads that share a loaded vector: with 4 sums each they fill the register file.
constexpr int kMaxHeads = HWY_TARGET == HWY_AVX2 ? 3 : 6;
constexpr std::size_t kBlocksAhead = 1;  // asked for while one is computed

// The sums of four vectors, as four lanes.
using FourTag = hn::FixedTag<float, 4>;
template <typename D>
HWY_INLINE hn::Vec<FourTag> fold(D d, hn::Vec<D> value) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return value;
  } else {
    const hn::Half<D> half;
    return fold(half, hn::Add(hn::LowerHalf(half, value), hn::UpperHalf(half, value)));
  }
}
HWY_INLINE hn::Vec<FourTag> sum_four(const FloatVec* value) {
  const FourTag d;
  hn::Vec<FourTag> folded[4];
  for (int i = 0; i < 4; ++i) folded[i] = fold(FloatTag(), value[i]);
  const auto low = hn::Add(hn::InterleaveLower(d, folded[0], folded[1]),
                           hn::InterleaveUpper(d, folded[0], folded[1]));
  const auto high = hn::Add(hn::InterleaveLower(d, folded[2], folded[3]),
                            hn::InterleaveUpper(d, folded[2], folded[3]));
  return hn::Add(hn::ConcatLowerLower(d, high, low), hn::ConcatUpperUpper(d, high, low));
}

// Asks for what comes next while this is computed: the hardware's own prefetch stops at each page.
template <typename T>
HWY_INLINE void prefetch_row(const T* row, int head_dim) {
  for (int dim = 0; dim < head_dim; dim += 32) __builtin_prefetch(row + dim);
}

// scores[h, 0..16) = factor * q[h] . k, for one block.
template <int kHeads, typename T>
HWY_INLINE void score_block(const float* q, int head_dim, const T* keys, const T* next,
                            float factor, float* scores) {
  const FloatTag d;
  for (int token = 0; token < kBlockTokens; token += 4) {
    FloatVec sum[kHeads][4];
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < 4; ++t) sum[h][t] = hn::Zero(d);
    }
    for (int t = token; t < token + 4; ++t) prefetch_row(next + t * head_dim, head_dim);
    const T* key = keys + token * head_dim;
    for (int dim = 0; dim < head_dim; dim += kLanes) {
      FloatVec query[kHeads];
      for (int h = 0; h < kHeads; ++h) query[h] = hn::LoadU(d, q + h * head_dim + dim);
      for (int t = 0; t < 4; ++t) {
        const auto k = load_float(d, key + t * head_dim + dim);
        for (int h = 0; h < kHeads; ++h) sum[h][t] = hn::MulAdd(query[h], k, sum[h][t]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      hn::StoreU(hn::Mul(sum_four(sum[h]), hn::Set(FourTag(), factor)), FourTag(),
                 scores + h * kBlockTokens + token);
    }
  }
}

// out[h, :] += sum over tokens of weights[h, token] * value, for kVecs vectors of columns.
template <int kHeads, int kVecs, typename T>
HWY_INLINE void add_values(const float* weights, const T* values, const T* next, int tokens,
                           int head_dim, float* out) {
  const FloatTag d;
  FloatVec sum[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) sum[h][v] = hn::LoadU(d, out + h * head_dim + v * kLanes);
  }
  for (int token = 0; token < tokens; ++token) {
    prefetch_row(next + token * head_dim, kVecs * kLanes);
    FloatVec weight[kHeads];
    for (int h = 0; h < kHeads; ++h) weight[h] = hn::Set(d, weights[h * kBlockTokens + token]);
    for (int v = 0; v < kVecs; ++v) {
      const auto value = load_float(d, values + token * head_dim + v * kLanes);
      for (int h = 0; h < kHeads; ++h) sum[h][v] = hn::MulAdd(weight[h], value, sum[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) hn::StoreU(sum[h][v], d, out + h * head_dim + v * kLanes);
  }
}

// Turns one head's scores into weights 2^(score - maximum); rescales what was summed before.
HWY_INLINE void weigh_block(float* scores, float highest, int head_dim, int head,
                            const DecodePartResult& result) {
  if (highest > result.maximum[head]) {
    const float shrink = std::exp2(result.maximum[head] - highest);
    result.sum[head] *= shrink;
    if (result.out != nullptr) scale_row(result.out + head * head_dim, head_dim, shrink);
    result.maximum[head] = highest;
  }
  result.sum[head] += exp2_row(scores, kBlockTokens, result.maximum[head]);
}

// Query heads [head, head + kHeads) over one block; `next` is the block to ask for meanwhile.
template <int kHeads, typename T>
void attend_block(const DecodePartArgs& args, int head, const KvBlock& block, const T* next,
                  const DecodePartResult& result) {
  const int dim = args.head_dim;
  const int values = kBlockTokens * dim;
  const T* keys = reinterpret_cast<const T*>(block.data);
  float scores[kHeads * kBlockTokens];
  score_block<kHeads>(args.q + head * dim, dim, keys, next, args.scale * kLog2E, scores);
  for (int h = 0; h < kHeads; ++h) {
    float* row = scores + h * kBlockTokens;
    std::fill(row + block.tokens, row + kBlockTokens, kMinusInfinity);
    const float highest = max_of_row(row, kBlockTokens);
    if (args.block_max != nullptr) {
      args.block_max[static_cast<std::ptrdiff_t>(head + h) * args.pitch + block.column] =
          highest * kLn2;
    }
    weigh_block(row, highest, dim, head + h, result);
  }
  if (result.out == nullptr) return;
  float* out = result.out + head * dim;
  int column = 0;
  for (; column + 4 * kLanes <= dim; column += 4 * kLanes) {
    add_values<kHeads, 4>(scores, keys + values + column, next + values + column, block.tokens, dim,
                          out + column);
  }
  for (; column < dim; column += 2 * kLanes) {
    add_values<kHeads, 2>(scores, keys + values + column, next + values + column, block.tokens, dim,
                          out + column);
  }
}

template <typename T, int kHeads = kMaxHeads>
HWY_INLINE void attend_heads(int heads, const DecodePartArgs& args, int head, const KvBlock& block,
                             const T* next, const DecodePartResult& result) {
  if (heads == kHeads) return attend_block<kHeads>(args, head, block, next, result);
  if constexpr (kHeads > 1) attend_heads<T, kHeads - 1>(heads, args, head, block, next, result);
}

template <typename T>
void attend_typed(const DecodePartArgs& args, std::span<const KvBlock> blocks,
                  const DecodePartResult& result) {
  const int passes = (args.group + kMaxHeads - 1) / kMaxHeads;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const std::size_t ahead = std::min(b + kBlocksAhead, blocks.size() - 1);
    const T* next = reinterpret_cast<const T*>(blocks[ahead].data);
    for (int pass = 0; pass < passes; ++pass) {
      const int head = args.group * pass / passes;
      const int heads = args.group * (pass + 1) / passes - head;
      attend_heads(heads, args, head, blocks[b], next, result);
    }
  }
}

void attend_blocks(const DecodePartArgs& args, std::span<const KvBlock> blocks,
                   const DecodePartResult& result) {
  std::fill_n(result.out, result.out == nullptr ? 0 : args.group * args.head_dim, 0.0F);
  std::fill_n(result.maximum, args.group, kMinusInfinity);
  std::fill_n(result.sum, args.group, 0.0F);
  with_kv_type(args.kv_type,
               [&](auto element) { attend_typed<decltype(element)>(args, blocks, result); });
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace foretoken::kernels::simd {

HWY_EXPORT(attend_blocks);
void attend_part(const DecodePartArgs& args, std::span<const KvBlock> blocks,
                 const DecodePartResult& result) {
  HWY_DYNAMIC_DISPATCH(attend_blocks)(args, blocks, result);
}

float merge_parts(const DecodePartResult& first, std::size_t stride, int count, int head_dim,
                  float* out) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const auto parts = static_cast<std::size_t>(count);
  float highest = kNone;
  for (std::size_t p = 0; p < parts; ++p) highest = std::max(highest, first.maximum[p * stride]);
  const int columns = out == nullptr ? 0 : head_dim;
  std::fill_n(out, columns, 0.0F);
  if (highest == kNone) return kNone;
  float sum = 0;
  for (std::size_t p = 0; p < parts; ++p) {
    const float weight = std::exp2(first.maximum[p * stride] - highest);
    sum += weight * first.sum[p * stride];
    for (int i = 0; i < columns; ++i)
      out[i] += weight * first.out[p * stride + static_cast<std::size_t>(i)];
  }
  for (int i = 0; i < columns; ++i) out[i] /= sum;
  return (highest + std::log2(sum)) * 0.69314718055994530942F;
}

}  // namespace foretoken::kernels::simd
#endif  // HWY_ONCE
