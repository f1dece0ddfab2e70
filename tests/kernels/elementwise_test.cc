// embed, rms_norm, swiglu and rope against tests/kernels/reference.h.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/reference.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

constexpr DataType kTypes[] = {DataType::kFp32, DataType::kFp16, DataType::kBf16};
// Rounding of a float sum or product, a few times over.
constexpr double kTolerance = 4e-6;

void expect_close(double actual, double expected, double scale = 1) {
  EXPECT_NEAR(actual, expected, kTolerance * std::max(scale, std::abs(expected)));
}

std::vector<double> doubles(std::span<const float> values) {
  return {values.begin(), values.end()};
}

TEST(Embed, CopiesRowsOfEveryType) {
  TestDevice test;
  for (const DataType type : kTypes) {
    for (const int hidden : {1, 7, 8, 65, 576}) {
      const auto columns = static_cast<std::size_t>(hidden);
      const auto table = reference::encode(random_floats(5 * columns, 1), type);
      const std::vector<TokenId> tokens = {14, 9, 10, 15};  // the table has 10 .. 14
      std::vector<float> out(4 * columns, 9);
      test.run(&Device::embed, EmbedArgs{.tokens = tokens.data(),
                                         .sequences = nullptr,
                                         .table = table.data(),
                                         .table_type = type,
                                         .first_token = 10,
                                         .table_tokens = 5,
                                         .num_tokens = 4,
                                         .hidden = hidden,
                                         .out = out.data()});
      for (std::size_t i = 0; i < out.size(); ++i) {
        const TokenId token = tokens[i / columns];
        const bool here = token >= 10 && token < 15;
        const std::size_t row = here ? static_cast<std::size_t>(token - 10) : 0;
        EXPECT_EQ(out[i],
                  here ? reference::decode_at(table.data(), type, row * columns + i % columns) : 0);
      }
    }
  }
}

TEST(Embed, ReadsTheSequencesNextToken) {
  TestDevice test;
  const std::vector<float> table = {0, 1, 2, 3};
  std::vector<TokenId> tokens = {3, 1, 2};
  std::int32_t length = 1;
  SequenceKv sequence{};
  sequence.length = &length;
  sequence.tokens = tokens.data();
  float out = 9;
  test.run(&Device::embed, EmbedArgs{.tokens = nullptr,
                                     .sequences = &sequence,
                                     .table = table.data(),
                                     .table_type = DataType::kFp32,
                                     .first_token = 0,
                                     .table_tokens = 4,
                                     .num_tokens = 1,
                                     .hidden = 1,
                                     .out = &out});
  EXPECT_EQ(out, 1);
}

TEST(RmsNorm, MatchesTheFormula) {
  TestDevice test;
  for (const int rows : {0, 1, 3, 100}) {
    for (const int columns : {1, 7, 64, 577}) {
      const auto width = static_cast<std::size_t>(columns);
      const auto x = random_floats(static_cast<std::size_t>(rows) * width, 1, 3);
      const auto weight = random_floats(width, 2);
      std::vector<float> out = x;
      test.run(&Device::rms_norm,
               RmsNormArgs{out.data(), weight.data(), 1e-5F, rows, columns, out.data()});
      for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
        const auto in = doubles(std::span(x).subspan(row * width, width));
        const auto expected = reference::rms_norm(in, weight, 1e-5);
        for (std::size_t i = 0; i < width; ++i) expect_close(out[row * width + i], expected[i]);
      }
    }
  }
}

TEST(SwiGlu, MatchesTheFormulaAndOverflowsNowhere) {
  TestDevice test;
  for (const int columns : {1, 9, 1536}) {
    const auto width = static_cast<std::size_t>(columns);
    auto gate_up = random_floats(3 * 2 * width, 1, 8);
    gate_up[0] = 3e38F;
    if (columns > 2) {
      gate_up[1] = -3e38F;
      gate_up[2] = -100;
    }
    std::vector<float> out(3 * width);
    test.run(&Device::swiglu, SwiGluArgs{gate_up.data(), 3, columns, out.data()});
    for (std::size_t i = 0; i < out.size(); ++i) {
      const std::size_t at = i / width * 2 * width + i % width;
      if (std::abs(gate_up[at]) > 1e38F) {
        EXPECT_FALSE(std::isnan(out[i])) << gate_up[at];
      } else {
        expect_close(out[i], reference::swiglu(gate_up[at], gate_up[at + width]));
      }
    }
  }
}

// ---- rope ----

struct RopeCase {
  int num_heads = 6;
  int num_kv_heads = 2;
  int head_dim = 64;
  DataType kv_type = DataType::kFp16;
  bool norm = false;
};

struct RopeTest : testing::TestWithParam<RopeCase> {
  RopeCase c = GetParam();
  int rows = 5;
  int width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim;
  std::vector<float> qkv = random_floats(static_cast<std::size_t>(rows * width), 1);
  std::vector<float> q_norm = random_floats(static_cast<std::size_t>(c.head_dim), 2);
  std::vector<float> k_norm = random_floats(static_cast<std::size_t>(c.head_dim), 3);
  std::vector<float> inv_freq;
  std::vector<float> q_out =
      std::vector<float>(static_cast<std::size_t>(rows * c.num_heads * c.head_dim));
  TestDevice test;

  void SetUp() override {
    for (int i = 0; i < c.head_dim / 2; ++i) {
      inv_freq.push_back(
          std::pow(1e5F, -2.0F * static_cast<float>(i) / static_cast<float>(c.head_dim)));
    }
  }
  RopeArgs args() {
    return {qkv.data(),
            c.norm ? q_norm.data() : nullptr,
            c.norm ? k_norm.data() : nullptr,
            1e-6F,
            inv_freq.data(),
            1.25F,
            rows,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            q_out.data()};
  }
  // Head h of q, k, v stacked, of a row at a position.
  std::vector<double> expected(int row, int head, int position) {
    const auto dim = static_cast<std::size_t>(c.head_dim);
    const auto at = static_cast<std::size_t>(row * width) + static_cast<std::size_t>(head) * dim;
    auto x = doubles(std::span(qkv).subspan(at, dim));
    if (head >= c.num_heads + c.num_kv_heads) return x;
    if (c.norm) x = reference::rms_norm(x, head < c.num_heads ? q_norm : k_norm, 1e-6);
    return reference::rotate(x, inv_freq, 1.25, position);
  }
  void check_q(int row, int position) {
    for (int h = 0; h < c.num_heads; ++h) {
      const auto head = expected(row, h, position);
      for (int d = 0; d < c.head_dim; ++d) {
        expect_close(q_out[static_cast<std::size_t>((row * c.num_heads + h) * c.head_dim + d)],
                     head[static_cast<std::size_t>(d)]);
      }
    }
  }
  // A stored head, whose values carry the KV type's rounding.
  void check_stored(const void* stored, int row, int head, int position) {
    const double rounding = c.kv_type == DataType::kFp16 ? 1.0 / 2048 : 1.0 / 256;
    const auto values = expected(row, head, position);
    for (std::size_t d = 0; d < values.size(); ++d) {
      EXPECT_NEAR(reference::decode_at(stored, c.kv_type, d), values[d],
                  rounding * std::abs(values[d]) + 4e-6);
    }
  }
};

TEST_P(RopeTest, PrefillWritesRowsOfTheScratch) {
  const int tokens = 40;
  const int begin = 30;
  const std::size_t bytes = static_cast<std::size_t>(c.num_kv_heads * tokens * c.head_dim) * 2;
  std::vector<std::byte> k(bytes, std::byte{0x11});
  std::vector<std::byte> v(bytes, std::byte{0x11});
  RopePrefillArgs prefill{args(), c.kv_type, begin, k.data(), v.data(), tokens};
  test.run(&Device::rope_prefill, prefill);
  for (int row = 0; row < rows; ++row) {
    check_q(row, begin + row);
    for (int h = 0; h < c.num_kv_heads; ++h) {
      const auto at = static_cast<std::size_t>((h * tokens + begin + row) * c.head_dim) * 2;
      check_stored(k.data() + at, row, c.num_heads + h, begin + row);
      check_stored(v.data() + at, row, c.num_heads + c.num_kv_heads + h, begin + row);
    }
  }
  EXPECT_EQ(k[static_cast<std::size_t>(begin * c.head_dim) * 2 - 1], std::byte{0x11});
  EXPECT_EQ(k[static_cast<std::size_t>((begin + rows) * c.head_dim) * 2], std::byte{0x11});
}

TEST_P(RopeTest, DecodeWritesTheOpenBlocksSlot) {
  constexpr int kLayer = 1;
  const KvShape shape{2, c.num_kv_heads, c.head_dim, c.kv_type};
  const int slots = 4;
  const int blocks = 8;
  const auto heads = static_cast<std::size_t>(2 * c.num_kv_heads);
  std::vector<SequenceKv> sequences;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::int32_t> lengths = {0, 15, 16, 47, 127};
  std::vector<std::int32_t> tables(heads * blocks, kAbsent);
  for (std::size_t head = 0; head < heads; ++head) {
    for (const int block : {0, 1, 2, 7}) {
      tables[head * blocks + static_cast<std::size_t>(block)] =
          (block + static_cast<int>(head)) % slots;
    }
  }
  for (int row = 0; row < rows; ++row) {
    memory.emplace_back(heads * slots * shape.block_bytes());
    SequenceKv kv{};
    kv.slots = memory.back().data();
    kv.block_to_slot = tables.data();
    kv.length = &lengths[static_cast<std::size_t>(row)];
    kv.num_slots = slots;
    kv.max_blocks = blocks;
    kv.shape = shape;
    sequences.push_back(kv);
  }
  test.run(&Device::rope_decode, RopeDecodeArgs{args(), sequences.data(), kLayer});
  for (int row = 0; row < rows; ++row) {
    const int position = lengths[static_cast<std::size_t>(row)];
    check_q(row, position);
    for (int h = 0; h < c.num_kv_heads; ++h) {
      const SequenceKv& kv = sequences[static_cast<std::size_t>(row)];
      const int slot =
          tables[static_cast<std::size_t>((c.num_kv_heads + h) * blocks + position / 16)];
      const std::byte* block = kv.slots + slot_offset(kv, kLayer, h, slot);
      const auto token = static_cast<std::size_t>(position % 16 * c.head_dim) * 2;
      check_stored(block + token, row, c.num_heads + h, position);
      check_stored(block + shape.block_bytes() / 2 + token, row, c.num_heads + c.num_kv_heads + h,
                   position);
    }
  }
}

TEST_P(RopeTest, TakesNoRows) {
  rows = 0;
  test.run(&Device::rope_prefill, RopePrefillArgs{args(), c.kv_type, 0, nullptr, nullptr, 0});
  test.run(&Device::rope_decode, RopeDecodeArgs{args(), nullptr, 0});
}

INSTANTIATE_TEST_SUITE_P(Shapes, RopeTest,
                         testing::Values(RopeCase{}, RopeCase{.kv_type = DataType::kBf16},
                                         RopeCase{9, 3, 64, DataType::kFp16, true},
                                         RopeCase{7, 1, 128, DataType::kBf16, true}));

}  // namespace
}  // namespace foretoken::kernels
