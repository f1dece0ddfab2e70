// Sketches of keys on the GPU against the CPU device: the same bytes, from the prefill scratch and
// from slots, and attention over them.
#include "kernels/key_sketch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/kernels/cuda/device_sequence.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

constexpr int kLayer = 1;

struct SketchCase {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int length;  // tokens stored
  DataType type = DataType::kBf16;
};

struct Sketched {
  std::vector<std::byte> of_prefill;  // layer kLayer, all complete blocks
  std::vector<std::byte> of_slots;    // both layers, the last complete block
  std::vector<float> lse, block_max;
};

// Keys of a moderate size, with outliers in some dims.
std::vector<float> keys_of(const SketchCase& c, int tokens) {
  auto keys = rounded(
      random_floats(static_cast<std::size_t>(c.num_kv_heads * tokens * c.head_dim), 4), c.type);
  for (std::size_t i = 3; i < keys.size(); i += 8) keys[i] = keys[i] * 16 + 64;
  return rounded(keys, c.type);
}

// The open block, the last complete one and every fifth other one have slots, of random moderate
// values.
Sketched sketch_and_attend(DeviceUnderTest& on, const SketchCase& c) {
  const KvShape shape{2, c.num_kv_heads, c.head_dim, c.type};
  const int complete = c.length / kBlockTokens;
  const int blocks = complete + 1;
  DeviceSequence sequence(on, shape, blocks / 5 + 3, blocks);
  const auto slot_elements = sequence.slots.get().size() / 2;
  sequence.slots.set(reference::encode(random_floats(slot_elements, 6), c.type));
  for (int layer = 0; layer < 2; ++layer) {
    for (int head = 0; head < c.num_kv_heads; ++head) {
      int used = 0;
      for (int block = 0; block < blocks; ++block) {
        if (block % 5 == 2 || block >= complete - 1) sequence.place(layer, head, block, used++);
      }
    }
  }
  sequence.upload();
  sequence.length.set({c.length});
  const DeviceArray<std::byte> sketches(
      on, std::vector<std::byte>(entries_of(shape, blocks) * sketch_bytes(shape)));
  SequenceKv kv = sequence.kv;
  kv.sketches = sketches.data();
  const DeviceArray<SequenceKv> view(on, {kv});

  const int tokens = c.length + 1;
  const DeviceArray<std::byte> scratch(on, reference::encode(keys_of(c, tokens), c.type));
  on.run(&Device::sketch_blocks,
         SketchBlocksArgs{scratch.data(), tokens, c.num_kv_heads, kLayer, complete, view.data()});
  Sketched result;
  result.of_prefill = sketches.get();

  const auto q_elements = static_cast<std::size_t>(c.num_heads * c.head_dim);
  const auto q = activations(on, rounded(random_floats(q_elements, 3), c.type));
  const int pitch = blocks + 2;
  const DeviceArray<float> lse(on, std::vector<float>(static_cast<std::size_t>(c.num_heads)));
  const DeviceArray<float> block_max(
      on, std::vector<float>(static_cast<std::size_t>(c.num_heads * pitch)));
  on.run(&Device::sketched_attention, DecodeAttentionArgs{.q = q.data(),
                                                          .sequences = view.data(),
                                                          .rows = 1,
                                                          .layer = kLayer,
                                                          .num_heads = c.num_heads,
                                                          .num_kv_heads = c.num_kv_heads,
                                                          .head_dim = c.head_dim,
                                                          .scale = 0.02F,
                                                          .out = nullptr,
                                                          .lse = lse.data(),
                                                          .block_max = block_max.data(),
                                                          .pitch = pitch});
  result.lse = lse.get();
  result.block_max = block_max.get();

  sequence.length.set({complete * kBlockTokens});
  on.run(&Device::sketch_filled, SketchFilledArgs{view.data(), 1});
  result.of_slots = sketches.get();
  return result;
}

class CudaKeySketch : public CudaTest, public testing::WithParamInterface<SketchCase> {};

TEST_P(CudaKeySketch, MatchesTheCpu) {
  const SketchCase& c = GetParam();
  Pair pair(c.type);
  const Sketched actual = sketch_and_attend(pair.cuda, c);
  const Sketched expected = sketch_and_attend(pair.cpu, c);
  EXPECT_EQ(actual.of_prefill, expected.of_prefill);
  EXPECT_EQ(actual.of_slots, expected.of_slots);
  for (std::size_t i = 0; i < expected.lse.size(); ++i) {
    // Logits of about 100 are sums of products of up to 60, in another order.
    ASSERT_NEAR(actual.lse[i], expected.lse[i], 1e-3) << i;
  }
  for (std::size_t i = 0; i < expected.block_max.size(); ++i) {
    if (std::isinf(expected.block_max[i])) {
      ASSERT_EQ(actual.block_max[i], expected.block_max[i]) << i;
    } else {
      ASSERT_NEAR(actual.block_max[i], expected.block_max[i], 1e-3) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaKeySketch,
                         testing::Values(SketchCase{1, 1, 64, 16}, SketchCase{9, 3, 64, 600},
                                         SketchCase{32, 8, 128, 4000, DataType::kFp16},
                                         SketchCase{14, 2, 64, 703}, SketchCase{20, 1, 128, 900},
                                         SketchCase{2, 2, 128, 50'000}));

TEST_F(CudaTest, SketchesTakeNoRowsAndNoBlocks) {
  Pair pair;
  pair.cuda.run(&Device::sketch_filled, SketchFilledArgs{});
  pair.cuda.run(&Device::sketch_blocks, SketchBlocksArgs{});
  DecodeAttentionArgs args{};
  args.num_heads = args.num_kv_heads = 1;
  args.head_dim = 64;
  pair.cuda.run(&Device::sketched_attention, args);
}

}  // namespace
}  // namespace foretoken::kernels
