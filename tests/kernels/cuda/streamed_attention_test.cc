// Streamed attention on the GPU against the CPU device: blocks in slots and blocks in the arena,
// any length, keys alone, and blocks that don't pass their check.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <random>
#include <vector>

#include "kernels/checksum.h"
#include "tests/kernels/cuda/device_sequence.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

constexpr int kLayer = 1;

struct StreamedCase {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  std::vector<int> lengths;  // tokens stored, a row
  DataType type = DataType::kBf16;
};

// K and V of a moderate size in the arena, checksums included; the open block and every fifth
// other one in slots too.
void fill_sequence(DeviceSequence& sequence, int length, std::uint32_t seed) {
  const KvShape& shape = sequence.kv.shape;
  const std::size_t block_bytes = shape.block_bytes();
  std::vector<std::byte> slots = sequence.slots.get();
  std::mt19937 random(seed);
  const int num_blocks = length / kBlockTokens + 1;
  // A pool of blocks: rounding random numbers takes long.
  const auto values = reference::encode(random_floats(16 * block_bytes / 2, seed), shape.kv_type);
  for (int head = 0; head < shape.num_kv_heads; ++head) {
    int used = 0;
    for (int block = 0; block < num_blocks; ++block) {
      std::byte* data = sequence.arena_block(kLayer, head, block);
      std::copy_n(values.data() + random() % 16 * block_bytes, block_bytes, data);
      const std::uint64_t checksum = block_checksum(data, block_bytes, kLayer, block);
      std::memcpy(sequence.slab(head, block) + slab_checksum_offset(shape, kLayer, block),
                  &checksum, sizeof checksum);
      if (block % 5 != 2 && block != num_blocks - 1) continue;
      sequence.place(kLayer, head, block, used);
      std::copy_n(data, block_bytes, slots.data() + slot_offset(sequence.kv, kLayer, head, used++));
    }
  }
  sequence.slots.set(slots);
  sequence.upload();
  sequence.length.set({length});
}

struct StreamedResult {
  std::vector<float> out, lse, block_max;
  std::uint32_t mismatches;
};

std::uint32_t num_mismatches(const std::deque<DeviceSequence>& sequences) {
  std::uint32_t sum = 0;
  for (const DeviceSequence& sequence : sequences) sum += sequence.mismatches.get()[0] - 7;
  return sum;
}

StreamedResult attend(DeviceUnderTest& on, const StreamedCase& c, bool values, bool with_block_max,
                      bool damaged) {
  const KvShape shape{2, c.num_kv_heads, c.head_dim, c.type};
  std::deque<DeviceSequence> sequences;
  std::vector<SequenceKv> views;
  int pitch = 3;
  for (const int length : c.lengths) {
    const int blocks = length / kBlockTokens + 1;
    pitch = std::max(pitch, blocks + 2);
    sequences.emplace_back(on, shape, blocks / 5 + 2, blocks);
    fill_sequence(sequences.back(), length, static_cast<std::uint32_t>(views.size() + 10));
    views.push_back(sequences.back().kv);
    if (damaged && blocks > 4) {
      sequences.back().arena_block(kLayer, 0, 1)[shape.block_bytes() - 1] ^= std::byte{1};
      sequences.back().slab(0, 3)[slab_checksum_offset(shape, kLayer, 3)] ^= std::byte{16};
    }
  }
  const std::size_t rows = c.lengths.size();
  const std::size_t heads = rows * static_cast<std::size_t>(c.num_heads);
  const std::size_t elements = heads * static_cast<std::size_t>(c.head_dim);
  const DeviceArray<SequenceKv> batch(on, views);
  const auto q = activations(on, rounded(random_floats(elements, 3), c.type));
  const auto out = activations(on, std::vector<float>(elements, 9));
  const DeviceArray<float> lse(on, std::vector<float>(heads, 9));
  const DeviceArray<float> block_max(on,
                                     std::vector<float>(heads * static_cast<std::size_t>(pitch)));
  const DecodeAttentionArgs base{.q = q.data(),
                                 .sequences = batch.data(),
                                 .rows = static_cast<int>(rows),
                                 .layer = kLayer,
                                 .num_heads = c.num_heads,
                                 .num_kv_heads = c.num_kv_heads,
                                 .head_dim = c.head_dim,
                                 .scale = 0.125F,
                                 .out = values ? out.data() : nullptr,
                                 .lse = lse.data(),
                                 .block_max = with_block_max ? block_max.data() : nullptr,
                                 .pitch = pitch};
  on.run(&Device::streamed_attention, base);
  return {floats_of(out, on.device->activation_type()), lse.get(), block_max.get(),
          num_mismatches(sequences)};
}

void expect_near(const StreamedResult& actual, const StreamedResult& expected) {
  EXPECT_EQ(actual.mismatches, expected.mismatches);
  for (std::size_t i = 0; i < expected.out.size(); ++i) {
    // Outputs of at most about 4, rounded to 8 bits.
    ASSERT_NEAR(actual.out[i], expected.out[i], 0.001 + 0.004 * std::abs(expected.out[i])) << i;
  }
  for (std::size_t i = 0; i < expected.lse.size(); ++i) {
    ASSERT_NEAR(actual.lse[i], expected.lse[i], 1e-4) << i;
  }
  for (std::size_t i = 0; i < expected.block_max.size(); ++i) {
    if (std::isinf(expected.block_max[i])) {
      ASSERT_EQ(actual.block_max[i], expected.block_max[i]) << i;
    } else {
      ASSERT_NEAR(actual.block_max[i], expected.block_max[i], 1e-4) << i;
    }
  }
}

class CudaStreamedAttention : public CudaTest, public testing::WithParamInterface<StreamedCase> {};

TEST_P(CudaStreamedAttention, MatchesTheCpu) {
  const StreamedCase& c = GetParam();
  Pair pair(c.type);
  for (const bool with_block_max : {true, false}) {
    expect_near(attend(pair.cuda, c, true, with_block_max, false),
                attend(pair.cpu, c, true, with_block_max, false));
  }
  const StreamedResult keys = attend(pair.cuda, c, false, true, false);
  expect_near(keys, attend(pair.cpu, c, false, true, false));
  EXPECT_EQ(keys.mismatches, 0U);
}

TEST_P(CudaStreamedAttention, LeavesOutWhatDoesNotPassItsCheck) {
  const StreamedCase& c = GetParam();
  Pair pair(c.type);
  for (const bool values : {true, false}) {
    expect_near(attend(pair.cuda, c, values, true, true), attend(pair.cpu, c, values, true, true));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaStreamedAttention,
    testing::Values(StreamedCase{1, 1, 64, {0}}, StreamedCase{9, 3, 64, {5, 15, 16, 600}},
                    StreamedCase{32, 8, 128, {1023, 15, 4000}, DataType::kFp16},
                    StreamedCase{14, 2, 64, {700, 3}}, StreamedCase{20, 1, 128, {900}},
                    StreamedCase{32, 1, 64, {333}, DataType::kFp16},
                    StreamedCase{2, 2, 128, {50'000}}));

TEST_F(CudaTest, StreamedAttentionTakesNoRows) {
  Pair pair;
  DecodeAttentionArgs args{};
  args.num_heads = args.num_kv_heads = 1;
  args.head_dim = 64;
  pair.cuda.run(&Device::streamed_attention, args);
}

}  // namespace
}  // namespace foretoken::kernels
