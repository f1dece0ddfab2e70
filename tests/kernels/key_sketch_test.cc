// Sketches of keys: what they stand for, how they are made, and attention over them.
#include "kernels/key_sketch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/checksum.h"
#include "tests/kernels/kv_sequence.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

constexpr int kLayer = 1;

// Field by field, as the header says it: low + step * level, before it is rounded to the KV type.
double restored(const std::byte* sketch, const KvShape& shape, int token, int dim) {
  const auto dims = static_cast<std::size_t>(shape.head_dim);
  const auto at = static_cast<std::size_t>(dim);
  std::uint32_t codes = 0;
  std::memcpy(&codes, sketch + 4 * at, 4);
  const double low = reference::decode_at(sketch + 4 * dims, shape.kv_type, at);
  const auto step = static_cast<std::uint16_t>(sketch[6 * dims + at]);
  return low +
         reference::from_fp16(static_cast<std::uint16_t>(step << 7)) * (codes >> 2 * token & 3U);
}

double step_of(const std::byte* sketch, const KvShape& shape, int dim) {
  const auto step = sketch[static_cast<std::size_t>(6 * shape.head_dim + dim)];
  return reference::from_fp16(static_cast<std::uint16_t>(static_cast<unsigned>(step) << 7));
}

// A sequence that keeps sketches, and the keys of one layer in a scratch; a dim in 8 is an outlier,
// another one never changes.
struct SketchedSequence {
  SketchedSequence(DataType type, int head_dim, int num_blocks)
      : shape{2, 2, head_dim, type},
        kv(shape, num_blocks + 1, num_blocks + 1),
        sketches(4 * static_cast<std::size_t>(kv.view.max_blocks) * sketch_bytes(shape)) {
    kv.view.sketches = sketches.data();
    scratch_tokens = num_blocks * kBlockTokens + 3;
    auto keys =
        random_floats(static_cast<std::size_t>(2 * scratch_tokens * head_dim), /*seed=*/5, 2);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const std::size_t dim = i % static_cast<std::size_t>(head_dim);
      if (dim % 8 == 3) keys[i] = 40 * keys[i] + 100;
      if (dim % 8 == 6) keys[i] = 0.7F;
    }
    scratch = reference::encode(keys, type);
  }
  SketchBlocksArgs args(int num_blocks) {
    return {scratch.data(), scratch_tokens, shape.num_kv_heads, kLayer, num_blocks, &kv.view};
  }
  double key(int head, int token, int dim) const {
    return reference::decode_at(
        scratch.data(), shape.kv_type,
        static_cast<std::size_t>((head * scratch_tokens + token) * shape.head_dim + dim));
  }
  const std::byte* keys_of(int head, int block) const {
    return scratch.data() +
           static_cast<std::size_t>((head * scratch_tokens + block * kBlockTokens) *
                                    shape.head_dim * 2);
  }
  std::byte* sketch(int layer, int head, int block) {
    return sketches.data() + sketch_offset(kv.view, layer, head, block);
  }

  KvShape shape;
  KvSequence kv;
  std::vector<std::byte> sketches;
  std::vector<std::byte> scratch;
  int scratch_tokens;
};

class KeySketch : public testing::TestWithParam<std::pair<DataType, int>> {
 protected:
  DataType type = GetParam().first;
  int head_dim = GetParam().second;
  TestDevice test;
};

TEST_P(KeySketch, IsWithinHalfAStepOfEachKey) {
  SketchedSequence s(type, head_dim, 21);
  test.run(&Device::sketch_blocks, s.args(21));
  for (int head = 0; head < 2; ++head) {
    for (int block = 0; block < 21; ++block) {
      const std::byte* sketch = s.sketch(kLayer, head, block);
      for (int dim = 0; dim < head_dim; ++dim) {
        double low = INFINITY;
        double high = -INFINITY;
        for (int t = 0; t < 16; ++t) {
          const double key = s.key(head, block * 16 + t, dim);
          low = std::min(low, key);
          high = std::max(high, key);
          ASSERT_LE(std::abs(restored(sketch, s.shape, t, dim) - key),
                    0.5001 * step_of(sketch, s.shape, dim))
              << head << " " << block << " " << t << " " << dim;
        }
        // 4 significant bits: off by a sixteenth at most.
        ASSERT_NEAR(step_of(sketch, s.shape, dim), (high - low) / 3, (high - low) / 48);
        ASSERT_EQ(reference::decode_at(sketch + sketch_low_offset(head_dim), type,
                                       static_cast<std::size_t>(dim)),
                  low);
      }
    }
  }
}

TEST_P(KeySketch, OfAFilledBlockIsThatOfItsPrefill) {
  SketchedSequence s(type, head_dim, 3);
  test.run(&Device::sketch_blocks, s.args(3));
  const std::vector<std::byte> of_prefill = s.sketches;
  std::ranges::fill(s.sketches, std::byte{0});
  s.kv.length = 48;
  for (int head = 0; head < 2; ++head) {
    s.kv.place(kLayer, head, 2, 1 - head);
    std::memcpy(s.kv.slot_data(kLayer, head, 1 - head), s.keys_of(head, 2),
                s.shape.block_bytes() / 2);
  }
  SequenceKv not_filled = s.kv.view;  // a row at another length
  std::int32_t other_length = 47;
  not_filled.length = &other_length;
  const SequenceKv rows[] = {not_filled, s.kv.view};
  test.run(&Device::sketch_filled, SketchFilledArgs{rows, 2});
  for (int head = 0; head < 2; ++head) {
    const std::size_t at = sketch_offset(s.kv.view, kLayer, head, 2);
    EXPECT_EQ(std::memcmp(s.sketches.data() + at, of_prefill.data() + at, sketch_bytes(s.shape)),
              0);
    // Layer 0 has no slot for the block: its sketch stays zero. So does everything else.
    for (const auto& [layer, block] : {std::pair{0, 2}, {kLayer, 1}, {kLayer, 3}}) {
      const std::byte* sketch = s.sketch(layer, head, block);
      EXPECT_TRUE(std::all_of(sketch, sketch + sketch_bytes(s.shape),
                              [](std::byte byte) { return byte == std::byte{0}; }));
    }
  }
}

// As streamed attention over an arena that holds the restored keys; the arena itself is not looked
// at: its blocks don't pass their check.
TEST_P(KeySketch, IsAttendedAsTheKeysItStandsFor) {
  constexpr int kBlocks = 37;
  SketchedSequence s(type, head_dim, kBlocks);
  test.run(&Device::sketch_blocks, s.args(kBlocks));
  s.kv.length = kBlocks * kBlockTokens - 5;
  const auto dims = static_cast<std::size_t>(head_dim);
  for (int head = 0; head < 2; ++head) {
    for (const int block : {0, 7, 20, kBlocks - 1}) {
      s.kv.place(kLayer, head, block, block);
      std::memcpy(s.kv.slot_data(kLayer, head, block), s.keys_of(head, block),
                  s.shape.block_bytes() / 2);
    }
  }
  constexpr int kHeads = 6;
  constexpr int kPitch = kBlocks + 4;
  const auto q = random_floats(kHeads * dims, 7);
  std::vector<float> lse(kHeads);
  std::vector<float> block_max(std::size_t{kHeads} * kPitch);
  DecodeAttentionArgs args{q.data(), &s.kv.view, 1,       kLayer,     kHeads,           2,
                           head_dim, 0.05F,      nullptr, lse.data(), block_max.data(), kPitch};
  test.run(&Device::sketched_attention, args);
  const auto estimated = std::pair(lse, block_max);

  for (int head = 0; head < 2; ++head) {
    for (int block = 0; block < kBlocks; ++block) {
      std::vector<float> keys;
      for (int t = 0; t < 16; ++t) {
        for (int dim = 0; dim < head_dim; ++dim) {
          keys.push_back(
              static_cast<float>(restored(s.sketch(kLayer, head, block), s.shape, t, dim)));
        }
      }
      const auto bytes = reference::encode(keys, type);
      std::byte* data = s.kv.arena_data(kLayer, head, block);
      std::memcpy(data, bytes.data(), bytes.size());
      const std::uint64_t sum = block_checksum(data, s.shape.block_bytes(), kLayer, block);
      std::memcpy(s.kv.slab(head, block) + slab_checksum_offset(s.shape, kLayer, block), &sum,
                  sizeof sum);
    }
  }
  test.run(&Device::streamed_attention, args);
  EXPECT_EQ(s.kv.mismatches, 0U);
  EXPECT_EQ(lse, estimated.first);
  EXPECT_EQ(block_max, estimated.second);
}

INSTANTIATE_TEST_SUITE_P(Shapes, KeySketch,
                         testing::Values(std::pair{DataType::kFp16, 64},
                                         std::pair{DataType::kBf16, 128},
                                         std::pair{DataType::kBf16, 96}));

TEST(KeySketchStep, ComesBackWithinASixteenth) {
  for (const float step : {0.0F, 0x1p-14F, 0.01F, 1.0F, 3.3F, 20'000.0F}) {
    const auto bits = reference::nearest(step, reference::from_fp16);
    const double back = reference::from_fp16(half_from_step(step_from_half(bits)));
    EXPECT_NEAR(back, step, step / 16);
  }
  EXPECT_TRUE(std::isfinite(reference::from_fp16(half_from_step(step_from_half(0x7C00)))));
}

}  // namespace
}  // namespace foretoken::kernels
