// Decode attention on the GPU against the CPU device: resident blocks in any slots, holes, the open
// block, groups of query heads, contexts from one token on; and rope_decode, which fills the open
// block.
#include "tests/kernels/cuda/cuda_test.h"
#include "tests/kernels/cuda/device_sequence.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

struct Case {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  std::vector<int> lengths;  // tokens stored, a row
  DataType type = DataType::kBf16;
};

// One row's sequence with random K and V of a moderate size, its slots in random order.
void fill(DeviceSequence& sequence, int length, DataType type, std::uint32_t seed) {
  const KvShape& shape = sequence.kv.shape;
  const std::size_t values = static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads) *
                             static_cast<std::size_t>(sequence.kv.num_slots) * shape.block_bytes() /
                             2;
  // The same million again where there are more: no multiple of a block.
  std::vector<float> kv = random_floats(std::min<std::size_t>(values, 1'000'003), seed);
  const std::size_t period = kv.size();
  kv.resize(values);
  for (std::size_t i = period; i < values; ++i) kv[i] = kv[i - period];
  sequence.slots.set(reference::encode(kv, type));
  std::mt19937 random(seed);
  const int num_blocks = length / kBlockTokens + 1;
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      std::vector<int> order(static_cast<std::size_t>(num_blocks));
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int block = 0; block < num_blocks; ++block) {
        const bool hole = block % 7 == 3 && block + 1 < num_blocks;
        if (!hole) sequence.place(layer, head, block, order[static_cast<std::size_t>(block)]);
      }
    }
  }
  sequence.upload();
  sequence.length.set({length});
}

struct Result {
  std::vector<float> out, lse;
  std::vector<float> block_max;  // of all rows and layers
};

Result run(DeviceUnderTest& on, const Case& c, bool with_block_max) {
  const KvShape shape{
      .num_layers = 2, .num_kv_heads = c.num_kv_heads, .head_dim = c.head_dim, .kv_type = c.type};
  std::vector<std::unique_ptr<DeviceSequence>> sequences;
  std::vector<DeviceArray<float>> block_max;
  std::vector<SequenceKv> views;
  for (std::size_t i = 0; i < c.lengths.size(); ++i) {
    const int blocks = c.lengths[i] / kBlockTokens + 1;
    const int slots = blocks + 3;
    sequences.push_back(std::make_unique<DeviceSequence>(on, shape, slots, slots));
    fill(*sequences.back(), c.lengths[i], c.type, static_cast<std::uint32_t>(i + 10));
    views.push_back(sequences.back()->kv);
    const int maxima = shape.num_layers * c.num_heads * slots;
    block_max.emplace_back(on, std::vector<float>(static_cast<std::size_t>(maxima), 9));
    if (with_block_max) views.back().block_max = block_max.back().data();
  }
  const std::size_t rows = c.lengths.size();
  const std::size_t heads = rows * static_cast<std::size_t>(c.num_heads);
  const std::size_t values = heads * static_cast<std::size_t>(c.head_dim);
  DeviceArray<SequenceKv> batch(on, views);
  auto q = activations(on, rounded(random_floats(values, 3), c.type));
  auto out = activations(on, std::vector<float>(values, 9));
  DeviceArray<float> lse(on, std::vector<float>(heads, 9));
  for (int repeat = 0; repeat < 3; ++repeat) {  // the mailbox is left as it was found
    on.run(&Device::decode_attention, DecodeAttentionArgs{.q = q.data(),
                                                          .sequences = batch.data(),
                                                          .rows = static_cast<int>(rows),
                                                          .layer = 1,
                                                          .num_heads = c.num_heads,
                                                          .num_kv_heads = c.num_kv_heads,
                                                          .head_dim = c.head_dim,
                                                          .scale = 0.125F,
                                                          .out = out.data(),
                                                          .lse = lse.data()});
  }
  Result result{floats_of(out, on.device->activation_type()), lse.get(), {}};
  for (const auto& maxima : block_max) {
    const std::vector<float> noted = maxima.get();
    result.block_max.insert(result.block_max.end(), noted.begin(), noted.end());
  }
  return result;
}

class CudaDecodeAttention : public CudaTest, public testing::WithParamInterface<Case> {};

void expect_the_cpus(DeviceUnderTest& cuda, DeviceUnderTest& cpu, const Case& c) {
  for (const bool with_block_max : {true, false}) {
    const Result actual = run(cuda, c, with_block_max);
    const Result expected = run(cpu, c, with_block_max);
    for (std::size_t i = 0; i < actual.out.size(); ++i) {
      ASSERT_NEAR(actual.out[i], expected.out[i], 0.012) << i;  // probabilities of 8 bits
    }
    for (std::size_t i = 0; i < actual.lse.size(); ++i) {
      ASSERT_NEAR(actual.lse[i], expected.lse[i], 2e-4) << i;
    }
    for (std::size_t i = 0; i < actual.block_max.size(); ++i) {
      if (std::isinf(expected.block_max[i])) {
        ASSERT_EQ(actual.block_max[i], expected.block_max[i]) << i;
      } else {
        ASSERT_NEAR(actual.block_max[i], expected.block_max[i], 2e-4) << i;
      }
    }
  }
}

TEST_P(CudaDecodeAttention, MatchesTheCpu) {
  Pair pair(GetParam().type);
  expect_the_cpus(pair.cuda, pair.cpu, GetParam());
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaDecodeAttention,
    testing::Values(Case{3, 1, 64, {0}}, Case{9, 3, 64, {1, 15, 16, 17}}, Case{32, 8, 128, {1000}},
                    Case{32, 8, 128, {5000}, DataType::kFp16}, Case{8, 8, 64, {255, 256, 257, 40}},
                    Case{14, 2, 64, {700, 3}},
                    Case{20, 1, 128, {900}},          // three passes of query heads
                    Case{4, 2, 64, {20000, 3, 900}},  // shares of one length, of long and short
                    Case{4, 1, 64, {131000}},         // many blocks a warp
                    Case{4, 4, 64, std::vector<int>(70, 33)},
                    Case{32, 8, 128, {200, 300, 400, 500, 600, 700, 800, 900, 10, 20, 30, 40}}));

TEST_F(CudaTest, RopeDecodeWritesTheOpenBlock) {
  const DataType type = DataType::kBf16;
  Pair pair(type);
  const KvShape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 64, .kv_type = type};
  const auto run_rope = [&](DeviceUnderTest& on) {
    DeviceSequence first(on, shape, 4, 8);
    DeviceSequence second(on, shape, 4, 8);
    for (int head = 0; head < 2; ++head) {
      first.place(1, head, 2, 1 + head);
      second.place(1, head, 0, 3 - head);
    }
    first.upload();
    second.upload();
    first.length.set({37});
    second.length.set({0});
    DeviceArray<SequenceKv> batch(on, {first.kv, second.kv});
    auto qkv = activations(on, rounded(random_floats(2 * 8 * 64, 1), type));
    auto q = activations(on, std::vector<float>(2 * 4 * 64));
    std::vector<float> inv_freq(32);
    for (int i = 0; i < 32; ++i) {
      inv_freq[static_cast<std::size_t>(i)] = static_cast<float>(std::pow(1e4, -i / 32.0));
    }
    DeviceArray<float> freq(on, inv_freq);
    RopeDecodeArgs args{};
    args.qkv = qkv.data();
    args.inv_freq = freq.data();
    args.scale = 1;
    args.rows = 2;
    args.num_heads = 4;
    args.num_kv_heads = 2;
    args.head_dim = 64;
    args.q_out = q.data();
    args.sequences = batch.data();
    args.layer = 1;
    on.run(&Device::rope_decode, args);
    auto values = floats_of(q, on.device->activation_type());
    for (const auto* sequence : {&first, &second}) {
      const auto slots = floats_of(sequence->slots, type);
      values.insert(values.end(), slots.begin(), slots.end());
    }
    return values;
  };
  const auto expected = run_rope(pair.cpu);
  const auto actual = run_rope(pair.cuda);
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(expected[i])) {  // bytes that nobody has written
      ASSERT_TRUE(std::isnan(actual[i])) << i;
    } else {
      ASSERT_NEAR(actual[i], expected[i], std::max(1e-2, std::abs(expected[i]) / 100.0)) << i;
    }
  }
}

// Shares of every number, one after the other on one stream, where nothing of a call may be left to
// the next.
TEST_F(CudaTest, SharesComeAndGo) {
  Pair pair;
  for (const int length : {300, 600, 900, 1200, 1800, 2600, 5000, 600, 2100, 300, 1500}) {
    SCOPED_TRACE(length);
    expect_the_cpus(pair.cuda, pair.cpu, {8, 2, 128, {length}});
  }
  expect_the_cpus(pair.cuda, pair.cpu, {8, 2, 64, {900}});
  expect_the_cpus(pair.cuda, pair.cpu, {8, 2, 128, {1500, 300, 2600, 5}});
  expect_the_cpus(pair.cuda, pair.cpu, {8, 2, 128, {600}});
}

// Attention reads blocks before the step's k and v have come into the open one.
TEST_F(CudaTest, AttentionSeesTheStepsOwnToken) {
  const DataType type = DataType::kBf16;
  DeviceUnderTest on(make_cuda_device({.activation_type = type}));
  const KvShape shape{.num_layers = 2, .num_kv_heads = 4, .head_dim = 128, .kv_type = type};
  constexpr int kHeads = 16;
  constexpr std::size_t kValues = kHeads * 128;
  DeviceArray<float> freq(on, std::vector<float>(64, 0.1F));
  auto q = activations(on, std::vector<float>(kValues));
  auto out = activations(on, std::vector<float>(kValues));
  DeviceArray<float> lse(on, std::vector<float>(kHeads));
  for (const int length : {0, 5, 16, 2000, 8191}) {
    DeviceSequence sequence(on, shape, 520, 520);
    fill(sequence, length, type, 5);
    DeviceArray<SequenceKv> batch(on, {sequence.kv});
    RopeDecodeArgs rope{};
    rope.inv_freq = freq.data();
    rope.scale = 1;
    rope.rows = 1;
    rope.num_heads = kHeads;
    rope.num_kv_heads = shape.num_kv_heads;
    rope.head_dim = shape.head_dim;
    rope.q_out = q.data();
    rope.sequences = batch.data();
    rope.layer = 1;
    const DecodeAttentionArgs attention{.q = q.data(),
                                        .sequences = batch.data(),
                                        .rows = 1,
                                        .layer = 1,
                                        .num_heads = kHeads,
                                        .num_kv_heads = shape.num_kv_heads,
                                        .head_dim = shape.head_dim,
                                        .scale = 0.125F,
                                        .out = out.data(),
                                        .lse = lse.data()};
    for (std::uint32_t seed = 0; seed < 20; ++seed) {
      const auto qkv = activations(on, random_floats(kValues + 2 * 4 * 128, seed, 4));
      rope.qkv = qkv.data();
      on.device->rope_decode(rope, *on.stream);
      on.run(&Device::decode_attention, attention);
      const std::vector<std::byte> at_once = out.get();
      on.run(&Device::decode_attention, attention);  // nothing before it
      ASSERT_EQ(at_once, out.get()) << length << ", " << seed;
    }
  }
}

}  // namespace
}  // namespace foretoken::kernels
