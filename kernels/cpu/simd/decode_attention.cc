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
constexpr int kPartTokens = kPartBlocks * kBlockTokens;

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

// scores[h, 0..16) = factor * q[h] . k, for one block; scores are kPartTokens apart.
template <int kHeads, typename T>
HWY_INLINE void score_block(const float* q, int head_dim, const T* keys, float factor,
                            float* scores) {
  const FloatTag d;
  for (int token = 0; token < kBlockTokens; token += 4) {
    FloatVec sum[kHeads][4];
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < 4; ++t) sum[h][t] = hn::Zero(d);
    }
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
                 scores + h * kPartTokens + token);
    }
  }
}

// out[h, :] += sum over tokens of weights[h, token] * value, for kVecs vectors of columns.
template <int kHeads, int kVecs, typename T>
HWY_INLINE void add_values(const float* weights, const T* values, int tokens, int head_dim,
                           float* out) {
  const FloatTag d;
  FloatVec sum[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) sum[h][v] = hn::LoadU(d, out + h * head_dim + v * kLanes);
  }
  for (int token = 0; token < tokens; ++token) {
    FloatVec weight[kHeads];
    for (int h = 0; h < kHeads; ++h) weight[h] = hn::Set(d, weights[h * kPartTokens + token]);
    for (int v = 0; v < kVecs; ++v) {
      const auto value = load_float(d, values + token * head_dim + v * kLanes);
      for (int h = 0; h < kHeads; ++h) sum[h][v] = hn::MulAdd(weight[h], value, sum[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) hn::StoreU(sum[h][v], d, out + h * head_dim + v * kLanes);
  }
}

// kHeads query heads from `head` on, over all blocks of the part.
template <int kHeads, typename T>
class PartHeads {
 public:
  PartHeads(const DecodePartArgs& args, int head, std::span<const KvBlock> blocks,
            const DecodePartResult& result)
      : args_(args), head_(head), blocks_(blocks), result_(result) {}

  void run() {
    score();
    for (int h = 0; h < kHeads; ++h) {
      const int used = static_cast<int>(blocks_.size()) * kBlockTokens;
      const float highest = max_of_row(scores_ + h * kPartTokens, used);
      result_.maximum[head_ + h] = highest;
      result_.sum[head_ + h] =
          used == 0 ? 0.0F : exp2_row(scores_ + h * kPartTokens, used, highest);
    }
    if (result_.out == nullptr) return;
    float* out = result_.out + head_ * args_.head_dim;
    std::fill_n(out, kHeads * args_.head_dim, 0.0F);
    for (std::size_t b = 0; b < blocks_.size(); ++b) add_block(b, out);
  }

 private:
  const T* keys(std::size_t b) const { return reinterpret_cast<const T*>(blocks_[b].data); }

  void score() {
    const float* q = args_.q + head_ * args_.head_dim;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      float* scores = scores_ + b * kBlockTokens;
      score_block<kHeads>(q, args_.head_dim, keys(b), args_.scale * kLog2E, scores);
      for (int h = 0; h < kHeads; ++h) {
        float* row = scores + h * kPartTokens;
        std::fill(row + blocks_[b].tokens, row + kBlockTokens, kMinusInfinity);
        args_.block_max[static_cast<std::ptrdiff_t>(head_ + h) * args_.pitch + blocks_[b].column] =
            max_of_row(row, kBlockTokens) * kLn2;
      }
    }
  }

  void add_block(std::size_t b, float* out) const {
    const int dim = args_.head_dim;
    const T* values = keys(b) + kBlockTokens * dim;
    const float* weights = scores_ + b * kBlockTokens;
    int column = 0;
    for (; column + 4 * kLanes <= dim; column += 4 * kLanes) {
      add_values<kHeads, 4>(weights, values + column, blocks_[b].tokens, dim, out + column);
    }
    for (; column < dim; column += 2 * kLanes) {
      add_values<kHeads, 2>(weights, values + column, blocks_[b].tokens, dim, out + column);
    }
  }

  const DecodePartArgs& args_;
  int head_;
  std::span<const KvBlock> blocks_;
  const DecodePartResult& result_;
  float scores_[kHeads * kPartTokens];
};

template <typename T, int kHeads = kMaxHeads>
HWY_INLINE void attend_heads(int heads, const DecodePartArgs& args, int head,
                             std::span<const KvBlock> blocks, const DecodePartResult& result) {
  if (heads == kHeads) return PartHeads<kHeads, T>(args, head, blocks, result).run();
  if constexpr (kHeads > 1) attend_heads<T, kHeads - 1>(heads, args, head, blocks, result);
}

void attend_blocks(const DecodePartArgs& args, std::span<const KvBlock> blocks,
                   const DecodePartResult& result) {
  const int passes = (args.group + kMaxHeads - 1) / kMaxHeads;
  for (int pass = 0; pass < passes; ++pass) {
    const int head = args.group * pass / passes;
    const int heads = args.group * (pass + 1) / passes - head;
    with_kv_type(args.kv_type, [&](auto element) {
      attend_heads<decltype(element)>(heads, args, head, blocks, result);
    });
  }
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
