#include "kernels/cpu/simd/prefill_attention.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd/prefill_attention.cc"
#include "kernels/cpu/simd/targets.h"
// Below Highway's choice of targets.
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd/key_tile-inl.h"
#include "kernels/cpu/simd/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace foretoken::kernels::simd::HWY_NAMESPACE {

// Rows whose scores are in flight between the two products; whole tiles of 6 and of 12 rows.
// Their scores and a column of the operands fit the caches of the first and second level.
constexpr int kScoreRows = 48;

// One query tile of prefill_attention, while it walks over the keys.
class AttentionTile {
 public:
  AttentionTile(const PrefillAttentionArgs& args, int kv_head, int first, int count, float* memory)
      : args_(args),
        tile_{kv_head,      args.num_heads / args.num_kv_heads, first, args.begin, args.num_heads,
              args.head_dim},
        rows_(count * tile_.group),
        q_(memory),
        out_(q_ + rows_ * args.head_dim),
        keys_(out_ + rows_ * args.head_dim),
        values_(keys_ + kKeyTile * args.head_dim),
        scores_(values_ + kKeyTile * args.head_dim),
        maximum_(scores_ + kScoreRows * kKeyTile),
        sum_(maximum_ + rows_) {}

  void run() {
    load_queries(tile_, args_.q, rows_, args_.scale * kLog2E, q_);
    std::fill_n(out_, rows_ * args_.head_dim, 0.0F);
    std::fill_n(maximum_, rows_, kMinusInfinity);
    std::fill_n(sum_, rows_, 0.0F);
    const int end = tile_.position(rows_ - 1) + 1;
    for (int key = 0; key < end; key += kKeyTile) attend(key, std::min(kKeyTile, end - key));
    store();
  }

 private:
  void attend(int key, int count) {
    const int dim = args_.head_dim;
    const auto at = (static_cast<std::ptrdiff_t>(tile_.kv_head) * args_.scratch_tokens + key) * dim;
    with_kv_type(args_.kv_type, [&](auto element) {
      using T = decltype(element);
      convert_keys(static_cast<const T*>(args_.k) + at, count, dim, keys_);
      convert_values(static_cast<const T*>(args_.v) + at, count, dim, values_);
    });
    for (int row = 0; row < rows_; row += kScoreRows) {
      attend_rows(row, std::min(kScoreRows, rows_ - row), key, count);
    }
  }

  void attend_rows(int first_row, int rows, int key, int count) {
    const int dim = args_.head_dim;
    const int seen = visible_keys(tile_.position(first_row + rows - 1), key, count);
    if (seen == 0) return;
    score_rows(q_ + first_row * dim, rows, dim, keys_, seen, scores_);
    for (int i = 0; i < rows; ++i) {
      const int row = first_row + i;
      float* scores = scores_ + i * kKeyTile;
      const int visible = visible_keys(tile_.position(row), key, seen);
      if (visible > 0) weigh(row, scores, visible);
      std::fill(scores + visible, scores + seen, 0.0F);
    }
    float* out = out_ + first_row * dim;
    for (int column = 0; column < dim; column += kTileColumns) {
      multiply_columns<kTileColumns>(rows, {scores_, kKeyTile},
                                     values_ + static_cast<std::ptrdiff_t>(column) * kKeyTile, seen,
                                     {out + column, dim}, {out + column, dim});
    }
  }

  // Turns a row's scores into weights 2^(score - maximum); rescales what was summed before.
  void weigh(int row, float* scores, int visible) {
    const float highest = max_of_row(scores, visible);
    if (highest > maximum_[row]) {
      const float shrink = std::exp2(maximum_[row] - highest);
      sum_[row] *= shrink;
      scale_row(out_ + row * args_.head_dim, args_.head_dim, shrink);
      maximum_[row] = highest;
    }
    sum_[row] += exp2_row(scores, visible, maximum_[row]);
  }

  void store() const {
    for (int row = 0; row < rows_; ++row) {
      const float inverse = 1.0F / sum_[row];
      float* to = static_cast<float*>(args_.out) + tile_.offset(row);
      for (int dim = 0; dim < args_.head_dim; ++dim) {
        to[dim] = out_[row * args_.head_dim + dim] * inverse;
      }
      if (args_.lse == nullptr) continue;
      args_.lse[static_cast<std::ptrdiff_t>(tile_.head(row)) * args_.max_rows + tile_.token(row)] =
          natural_lse(maximum_[row], sum_[row]);
    }
  }

  const PrefillAttentionArgs& args_;
  QueryTile tile_;
  int rows_;
  float* q_;        // [rows, head_dim], times scale * log2(e): scores are logarithms to base 2
  float* out_;      // [rows, head_dim], not yet divided by sum_
  float* keys_;     // see convert_keys
  float* values_;   // see convert_values
  float* scores_;   // [kScoreRows, kKeyTile]
  float* maximum_;  // [rows]
  float* sum_;      // [rows]
};

std::size_t attention_scratch(int rows, int head_dim) {
  const int attention = 2 * (rows + kKeyTile) * head_dim + kScoreRows * kKeyTile + 2 * rows;
  const int block_max = (rows + kKeyTile) * head_dim + rows * kKeyTile;
  return static_cast<std::size_t>(std::max(attention, block_max));
}

void attention_tile(const PrefillAttentionArgs& args, int kv_head, int first, int count,
                    float* scratch) {
  AttentionTile(args, kv_head, first, count, scratch).run();
}

void block_max_tile(const PrefillBlockMaxArgs& args, int kv_head, int first, int count, int key,
                    float* scratch) {
  const int dim = args.head_dim;
  const QueryTile tile{
      kv_head, args.num_heads / args.num_kv_heads, first, args.begin, args.num_heads, dim};
  const int rows = count * tile.group;
  float* q = scratch;
  float* keys = q + rows * dim;
  float* scores = keys + kKeyTile * dim;
  load_queries(tile, args.q, rows, args.scale, q);
  const int num_keys = visible_keys(args.begin + args.rows - 1, key, kKeyTile);
  with_kv_type(args.kv_type, [&](auto element) {
    const auto* k = static_cast<const decltype(element)*>(args.k);
    convert_keys(k + (static_cast<std::ptrdiff_t>(kv_head) * args.scratch_tokens + key) * dim,
                 num_keys, dim, keys);
  });
  score_rows(q, rows, dim, keys, num_keys, scores);
  for (int row = 0; row < rows; ++row) {
    float* to =
        args.block_max +
        (static_cast<std::ptrdiff_t>(tile.head(row)) * args.rows + tile.token(row)) * args.pitch +
        key / kBlockTokens;
    for (int begin = 0; begin < num_keys; begin += kBlockTokens) {
      const int visible = visible_keys(tile.position(row), key + begin, kBlockTokens);
      *to++ = max_of_row(scores + row * kKeyTile + begin, visible);
    }
  }
}

}  // namespace foretoken::kernels::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace foretoken::kernels::simd {

int query_tile_tokens(int group) { return std::max(1, 192 / group); }

HWY_EXPORT(attention_scratch);
std::size_t prefill_scratch(int group, int head_dim) {
  return HWY_DYNAMIC_DISPATCH(attention_scratch)(query_tile_tokens(group) * group, head_dim);
}
HWY_EXPORT(attention_tile);
void prefill_attention_tile(const PrefillAttentionArgs& args, int kv_head, int first, int count,
                            float* scratch) {
  HWY_DYNAMIC_DISPATCH(attention_tile)(args, kv_head, first, count, scratch);
}
HWY_EXPORT(block_max_tile);
void prefill_block_max_tile(const PrefillBlockMaxArgs& args, int kv_head, int first, int count,
                            int key, float* scratch) {
  HWY_DYNAMIC_DISPATCH(block_max_tile)(args, kv_head, first, count, key, scratch);
}

}  // namespace foretoken::kernels::simd
#endif  // HWY_ONCE
