// Prefill, decode and streamed attention against tests/kernels/reference.h.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>

#include "kernels/checksum.h"
#include "kernels/one_head.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Scores are float sums of head_dim products of about 1; their error passes into the weights.
constexpr double kTolerance = 2e-5;

struct Shape {
  int num_kv_heads;
  int group;
  int head_dim;
  DataType kv_type;
};
void PrintTo(const Shape& s, std::ostream* out) {
  *out << s.num_kv_heads << " KV heads x " << s.group << ", head_dim " << s.head_dim << ", "
       << name_of(s.kv_type);
}
const Shape kShapes[] = {{1, 1, 64, DataType::kFp16},  {3, 3, 64, DataType::kFp16},
                         {2, 4, 128, DataType::kBf16}, {1, 7, 64, DataType::kBf16},
                         {2, 8, 128, DataType::kFp16}, {1, 2, 96, DataType::kFp16}};

// ---- prefill ----

class Prefill : public testing::TestWithParam<Shape> {
 protected:
  Shape s = GetParam();
  int num_heads = s.num_kv_heads * s.group;
  float scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
  std::vector<float> q;
  std::vector<std::byte> k;
  std::vector<std::byte> v;
  int scratch_tokens = 0;
  int max_rows = 0;

  // Random q for `rows` rows from `begin` on, and k, v; rows that nobody may read are NaN.
  void fill(int begin, int rows) {
    scratch_tokens = begin + rows + 5;
    max_rows = rows + 3;
    const auto dim = static_cast<std::size_t>(s.head_dim);
    q = random_floats(static_cast<std::size_t>(max_rows * num_heads) * dim, 1);
    const auto count = static_cast<std::size_t>(s.num_kv_heads * scratch_tokens) * dim;
    auto keys = random_floats(count, 2, 2);
    auto values = random_floats(count, 3);
    for (int h = 0; h < s.num_kv_heads; ++h) {
      for (int t = begin + rows; t < scratch_tokens; ++t) {
        const auto at = static_cast<std::size_t>(h * scratch_tokens + t) * dim;
        std::fill_n(keys.begin() + static_cast<std::ptrdiff_t>(at), dim, NAN);
        std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(at), dim, NAN);
      }
    }
    k = encode(keys);
    v = encode(values);
  }
  std::vector<std::byte> encode(const std::vector<float>& values) const {
    auto bytes = reference::encode(values, s.kv_type);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (std::isnan(values[i])) bytes[2 * i] = bytes[2 * i + 1] = std::byte{0x7F};
    }
    return bytes;
  }
  reference::Attention expected(int begin, int row, int head) const {
    const auto at = [&](const std::vector<std::byte>& from, int t, int d) {
      const int index = (head / s.group * scratch_tokens + t) * s.head_dim + d;
      return reference::decode_at(from.data(), s.kv_type, static_cast<std::size_t>(index));
    };
    const auto query =
        std::span(q).subspan(static_cast<std::size_t>((row * num_heads + head) * s.head_dim),
                             static_cast<std::size_t>(s.head_dim));
    return reference::attend(
        query, begin + row + 1, scale, [&](int t, int d) { return at(k, t, d); },
        [&](int t, int d) { return at(v, t, d); });
  }
  PrefillAttentionArgs args(int begin, int rows, float* out, float* lse) {
    return {q.data(), k.data(),  v.data(),       s.kv_type,  scratch_tokens, begin, rows,
            max_rows, num_heads, s.num_kv_heads, s.head_dim, scale,          out,   lse};
  }
};

TEST_P(Prefill, MatchesTheFormula) {
  for (const auto& [begin, rows] :
       {std::pair{0, 0}, {0, 1}, {0, 17}, {0, 130}, {100, 1}, {250, 61}}) {
    SCOPED_TRACE(std::to_string(begin) + " + " + std::to_string(rows));
    fill(begin, rows);
    TestDevice test;
    std::vector<float> out(q.size(), NAN);
    std::vector<float> lse(static_cast<std::size_t>(max_rows * num_heads), NAN);
    test.run(&Device::prefill_attention, args(begin, rows, out.data(), lse.data()));
    for (int row = 0; row < rows; ++row) {
      for (int head = 0; head < num_heads; ++head) {
        const auto want = expected(begin, row, head);
        for (int d = 0; d < s.head_dim; ++d) {
          const auto at = static_cast<std::size_t>((row * num_heads + head) * s.head_dim + d);
          ASSERT_NEAR(out[at], want.out[static_cast<std::size_t>(d)], kTolerance);
        }
        ASSERT_NEAR(lse[static_cast<std::size_t>(head * max_rows + row)], want.lse, kTolerance);
      }
    }
  }
}

TEST_P(Prefill, IsEqualToTheBitHoweverItIsCut) {
  const int tokens = 300;
  fill(0, tokens);
  TestDevice one(1);
  std::vector<float> whole(q.size());
  one.run(&Device::prefill_attention, args(0, tokens, whole.data(), nullptr));
  TestDevice three(3);
  std::vector<float> parts(q.size());
  const int row_floats = num_heads * s.head_dim;
  for (const auto& [begin, rows] : {std::pair{0, 37}, {37, 200}, {237, 63}}) {
    auto part = args(begin, rows, parts.data() + begin * row_floats, nullptr);
    part.q = q.data() + begin * row_floats;
    part.max_rows = rows;
    three.run(&Device::prefill_attention, part);
  }
  EXPECT_EQ(whole, parts);
}

TEST_P(Prefill, BlockMaximaAreThoseOfTheLogits) {
  for (const auto& [begin, rows] : {std::pair{0, 0}, {0, 1}, {0, 64}, {230, 64}, {127, 2}}) {
    SCOPED_TRACE(std::to_string(begin) + " + " + std::to_string(rows));
    fill(begin, rows);
    const int blocks = blocks_for(begin + rows);
    const int pitch = blocks + 3;
    TestDevice test;
    std::vector<float> block_max(static_cast<std::size_t>(num_heads * rows * pitch), NAN);
    test.run(
        &Device::prefill_block_max,
        PrefillBlockMaxArgs{q.data(), k.data(), s.kv_type, scratch_tokens, begin, rows, num_heads,
                            s.num_kv_heads, s.head_dim, scale, block_max.data(), pitch});
    for (int head = 0; head < num_heads; ++head) {
      for (int row = 0; row < rows; ++row) {
        const auto want = expected(begin, row, head);
        for (int block = 0; block < pitch; ++block) {
          double highest = -kInfinity;
          for (std::size_t t = static_cast<std::size_t>(block) * 16;
               t < std::min(want.logits.size(), static_cast<std::size_t>(block + 1) * 16); ++t) {
            highest = std::max(highest, want.logits[t]);
          }
          const float actual =
              block_max[static_cast<std::size_t>((head * rows + row) * pitch + block)];
          if (std::isinf(highest)) {
            ASSERT_EQ(actual, highest);
          } else {
            ASSERT_NEAR(actual, highest, kTolerance);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Prefill, testing::ValuesIn(kShapes));

TEST(PrefillAttention, LargeLogitsStayFinite) {
  // Logits of +-6400 overflow any exponential that isn't taken relative to the maximum.
  const std::vector<float> ones(64 * 20, 10);
  auto keys = reference::encode(ones, DataType::kFp16);
  std::vector<float> out(64);
  float lse = 0;
  TestDevice test;
  for (const float sign : {1.0F, -1.0F}) {
    const std::vector<float> q(64, 10 * sign);
    test.run(&Device::prefill_attention,
             PrefillAttentionArgs{q.data(), keys.data(), keys.data(), DataType::kFp16, 20, 19, 1, 1,
                                  1, 1, 64, 1.0F, out.data(), &lse});
    for (const float value : out) EXPECT_NEAR(value, 10, 1e-4);
    EXPECT_NEAR(lse, sign * 6400 + std::log(20.0), 2e-3);
  }
}

// ---- decode ----

// A sequence with random KV in the arena and some of it in slots.
struct Sequence {
  Sequence(const Shape& s, int layers, int stored, int num_slots, std::uint32_t seed)
      : shape{layers, s.num_kv_heads, s.head_dim, s.kv_type},
        length(stored),
        slots_per_head(num_slots) {
    const int segments = segments_for(stored + 1);
    const int blocks = segments * kSegmentBlocks;
    const auto heads = static_cast<std::size_t>(layers * s.num_kv_heads);
    block_to_slot.assign(heads * static_cast<std::size_t>(blocks), kAbsent);
    slot_to_block.assign(heads * static_cast<std::size_t>(num_slots), kAbsent);
    slots.assign(heads * static_cast<std::size_t>(num_slots) * shape.block_bytes(),
                 std::byte{0x7F});
    for (int i = 0; i < s.num_kv_heads * segments; ++i) {
      const auto values =
          random_floats(shape.slab_payload_bytes() / 2, seed + static_cast<std::uint32_t>(i), 1.5F);
      slabs.push_back(reference::encode(values, s.kv_type));
      slabs.back().resize(shape.slab_bytes());
    }
    for (auto& slab : slabs) slab_pointers.push_back(slab.data());
    kv.slots = slots.data();
    kv.block_to_slot = block_to_slot.data();
    kv.slot_to_block = slot_to_block.data();
    kv.slabs = slab_pointers.data();
    kv.length = &length;
    kv.num_slots = num_slots;
    kv.max_blocks = blocks;
    kv.max_segments = segments;
    kv.shape = shape;
    kv.mismatches = &mismatches;
    block_max.assign(static_cast<std::size_t>(layers * s.num_kv_heads * s.group * num_slots), NAN);
    kv.block_max = block_max.data();
    for (int layer = 0; layer < layers; ++layer) {
      for (int head = 0; head < s.num_kv_heads; ++head) {
        for (int block = 0; block < blocks; ++block) sign(layer, head, block);
      }
    }
  }

  std::byte* arena(int layer, int head, int block) {
    return slab_pointers[static_cast<std::size_t>(head * kv.max_segments +
                                                  block / kSegmentBlocks)] +
           slab_block_offset(shape, layer, block);
  }
  void sign(int layer, int head, int block) {
    const std::uint64_t sum =
        block_checksum(arena(layer, head, block), shape.block_bytes(), layer, block);
    std::byte* slab =
        slab_pointers[static_cast<std::size_t>(head * kv.max_segments + block / kSegmentBlocks)];
    std::memcpy(slab + slab_checksum_offset(shape, layer, block), &sum, sizeof sum);
  }
  // Copies a block's stored tokens, this step's included, into a slot; what is past them is NaN.
  void make_resident(int layer, int head, int block, int slot) {
    const auto index = static_cast<std::size_t>(layer * shape.num_kv_heads + head);
    block_to_slot[index * static_cast<std::size_t>(kv.max_blocks) +
                  static_cast<std::size_t>(block)] = slot;
    slot_to_block[index * static_cast<std::size_t>(kv.num_slots) + static_cast<std::size_t>(slot)] =
        block;
    const std::size_t half = shape.block_bytes() / 2;
    const auto tokens = static_cast<std::size_t>(std::clamp(length + 1 - block * 16, 0, 16));
    std::byte* to = slots.data() + slot_offset(kv, layer, head, slot);
    for (const std::size_t part : {std::size_t{0}, half}) {
      std::copy_n(arena(layer, head, block) + part, tokens * half / 16, to + part);
    }
  }
  // Every block in a slot of its own, in an order that differs between heads.
  void make_all_resident() {
    const int blocks = length / 16 + 1;
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        for (int block = 0; block < blocks; ++block) {
          make_resident(layer, head, block, (block * 7 + head * 3) % blocks % slots_per_head);
        }
      }
    }
  }
  // Attention of q over the tokens of these blocks.
  reference::Attention expected(std::span<const float> q, int layer, int head, double scale,
                                const std::vector<int>& blocks) {
    std::vector<std::pair<int, int>> tokens;
    for (const int block : blocks) {
      for (int t = 0; t < 16 && block * 16 + t <= length; ++t) tokens.push_back({block, t});
    }
    const auto at = [&](int i, int d, int part) {
      const auto [block, t] = tokens[static_cast<std::size_t>(i)];
      return reference::decode_at(arena(layer, head, block), shape.kv_type,
                                  static_cast<std::size_t>((part * 16 + t) * shape.head_dim + d));
    };
    return reference::attend(
        q, static_cast<int>(tokens.size()), scale, [&](int i, int d) { return at(i, d, 0); },
        [&](int i, int d) { return at(i, d, 1); });
  }

  KvShape shape;
  std::int32_t length;
  int slots_per_head;
  std::vector<std::byte> slots;
  std::vector<std::int32_t> block_to_slot;
  std::vector<std::int32_t> slot_to_block;
  std::vector<std::vector<std::byte>> slabs;
  std::vector<std::byte*> slab_pointers;
  std::vector<float> block_max;  // by slot, of all layers
  SequenceKv kv{};
  std::uint32_t mismatches = 0;
};

class Decode : public testing::TestWithParam<Shape> {
 protected:
  static constexpr int kLayers = 2;
  static constexpr int kLayer = 1;
  Shape s = GetParam();
  int num_heads = s.num_kv_heads * s.group;
  float scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
  std::vector<float> q;
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<float> block_max;  // by block, of an op over all blocks
  int pitch = 80;
  TestDevice test;

  DecodeAttentionArgs args(const std::vector<SequenceKv>& sequences) {
    const auto rows = sequences.size();
    const auto heads = rows * static_cast<std::size_t>(num_heads);
    q = random_floats(heads * static_cast<std::size_t>(s.head_dim), 11);
    out.assign(q.size(), NAN);
    lse.assign(heads, NAN);
    return {q.data(),
            sequences.data(),
            static_cast<int>(rows),
            kLayer,
            num_heads,
            s.num_kv_heads,
            s.head_dim,
            scale,
            out.data(),
            lse.data()};
  }
  DecodeAttentionArgs all_blocks(const std::vector<SequenceKv>& sequences) {
    DecodeAttentionArgs all = args(sequences);
    const std::size_t heads = sequences.size() * static_cast<std::size_t>(num_heads);
    block_max.assign(heads * static_cast<std::size_t>(pitch), NAN);
    all.block_max = block_max.data();
    all.pitch = pitch;
    return all;
  }
  std::span<const float> by_block(int row, int head) const {
    const auto width = static_cast<std::size_t>(pitch);
    return std::span(block_max).subspan(static_cast<std::size_t>(row * num_heads + head) * width,
                                        width);
  }
  std::span<const float> by_slot(const Sequence& sequence, int head) const {
    return {block_max_of(sequence.kv, kLayer, num_heads, head),
            static_cast<std::size_t>(sequence.slots_per_head)};
  }
  // columns[c]: the block that column c stands for, or kAbsent, as are further ones of `maxima`.
  void check(Sequence& sequence, int row, int head, const std::vector<int>& columns,
             std::span<const float> maxima) {
    const auto at = static_cast<std::size_t>(row * num_heads + head);
    const auto dim = static_cast<std::size_t>(s.head_dim);
    const auto query = std::span(q).subspan(at * dim, dim);
    std::vector<int> blocks;
    for (const int block : columns) {
      if (block != kAbsent) blocks.push_back(block);
    }
    const auto want = sequence.expected(query, kLayer, head / s.group, scale, blocks);
    for (std::size_t d = 0; d < dim; ++d) ASSERT_NEAR(out[at * dim + d], want.out[d], kTolerance);
    if (blocks.empty()) {
      ASSERT_EQ(lse[at], -kInfinity);
    } else {
      ASSERT_NEAR(lse[at], want.lse, kTolerance);
    }
    for (std::size_t column = 0; column < maxima.size(); ++column) {
      const int block = column < columns.size() ? columns[column] : kAbsent;
      if (block == kAbsent) {
        ASSERT_EQ(maxima[column], -kInfinity) << column;
        continue;
      }
      const auto one = sequence.expected(query, kLayer, head / s.group, scale, {block});
      ASSERT_NEAR(maxima[column], *std::max_element(one.logits.begin(), one.logits.end()),
                  kTolerance)
          << column;
    }
  }
};

TEST_P(Decode, AttendsEverySlotThatHoldsABlock) {
  // Lengths: an empty sequence, a part of a block, a full one, and several parts.
  std::deque<Sequence> all;  // they hold pointers to themselves
  for (const int length : {0, 5, 15, 16, 600}) {
    all.emplace_back(s, kLayers, length, /*num_slots=*/length / 16 + 3, 20);
  }
  std::vector<SequenceKv> sequences;
  for (Sequence& sequence : all) {
    sequence.make_all_resident();
    sequences.push_back(sequence.kv);
  }
  test.run(&Device::decode_attention, args(sequences));
  for (std::size_t row = 0; row < all.size(); ++row) {
    for (int head = 0; head < num_heads; ++head) {
      const auto slots = static_cast<std::size_t>(all[row].slots_per_head);
      const auto first =
          all[row].slot_to_block.begin() +
          static_cast<std::ptrdiff_t>(slots) * (kLayer * s.num_kv_heads + head / s.group);
      check(all[row], static_cast<int>(row), head,
            {first, first + static_cast<std::ptrdiff_t>(slots)}, by_slot(all[row], head));
    }
    EXPECT_TRUE(std::isnan(all[row].block_max.front())) << "another layer's";
  }
}

TEST_P(Decode, NotesNoBlockMaximaThatNobodyObserves) {
  Sequence sequence(s, kLayers, 300, 20, 20);
  sequence.make_all_resident();
  std::vector<SequenceKv> sequences = {sequence.kv};
  test.run(&Device::decode_attention, args(sequences));
  const auto observed = std::pair(out, lse);
  sequences[0].block_max = nullptr;
  test.run(&Device::decode_attention, args(sequences));
  EXPECT_EQ(std::pair(out, lse), observed);
}

TEST_P(Decode, SkipsEmptySlots) {
  Sequence sequence(s, kLayers, 520, /*num_slots=*/20, 20);
  std::vector<int> columns(20, kAbsent);
  for (const auto& [slot, block] : {std::pair{3, 32}, {0, 0}, {19, 30}, {7, 31}}) {
    columns[static_cast<std::size_t>(slot)] = block;
    for (int head = 0; head < s.num_kv_heads; ++head)
      sequence.make_resident(kLayer, head, block, slot);
  }
  const std::vector<SequenceKv> sequences = {sequence.kv};
  test.run(&Device::decode_attention, args(sequences));
  for (int head = 0; head < num_heads; ++head) {
    check(sequence, 0, head, columns, by_slot(sequence, head));
  }
}

TEST_P(Decode, IsEqualToTheBitOnAnyNumberOfThreads) {
  Sequence sequence(s, kLayers, 900, 60, 20);
  sequence.make_all_resident();
  const std::vector<SequenceKv> sequences = {sequence.kv};
  const auto two = args(sequences);
  test.run(&Device::decode_attention, two);
  const std::vector<float> first = out;
  TestDevice other(5);
  other.run(&Device::decode_attention, args(sequences));
  EXPECT_EQ(out, first);
}

TEST_P(Decode, TakesNoRows) { test.run(&Device::decode_attention, args({})); }

TEST_P(Decode, StreamsAbsentBlocksFromTheArena) {
  std::deque<Sequence> all;  // they hold pointers to themselves
  for (const int length : {7, 16, 600, 1023}) all.emplace_back(s, kLayers, length, 6, 40);
  std::vector<SequenceKv> sequences;
  for (Sequence& sequence : all) {
    for (int head = 0; head < s.num_kv_heads; ++head) {
      sequence.make_resident(kLayer, head, sequence.length / 16, 4);
      sequence.make_resident(kLayer, head, 0, sequence.length < 16 ? 4 : 2);
    }
    sequences.push_back(sequence.kv);
  }
  test.run(&Device::streamed_attention, all_blocks(sequences));
  for (const Sequence& sequence : all) EXPECT_EQ(sequence.mismatches, 0U);
  for (std::size_t row = 0; row < all.size(); ++row) {
    std::vector<int> columns(static_cast<std::size_t>(all[row].length / 16 + 1));
    for (std::size_t i = 0; i < columns.size(); ++i) columns[i] = static_cast<int>(i);
    for (int head = 0; head < num_heads; ++head)
      check(all[row], static_cast<int>(row), head, columns, by_block(static_cast<int>(row), head));
  }
  // Without `out` the keys alone are read, with the same result.
  const auto with_values = std::pair(lse, block_max);
  DecodeAttentionArgs keys_alone = all_blocks(sequences);
  keys_alone.out = nullptr;
  test.run(&Device::streamed_attention, keys_alone);
  EXPECT_EQ(lse, with_values.first);
  for (std::size_t i = 0; i < block_max.size(); ++i) {
    if (!std::isnan(with_values.second[i])) {
      ASSERT_EQ(block_max[i], with_values.second[i]) << i;
    }
  }
}

TEST_P(Decode, StreamsOneHeadOfSeveral) {
  Sequence sequence(s, kLayers, 300, 6, 60);
  for (int head = 0; head < s.num_kv_heads; ++head) {
    sequence.make_resident(kLayer, head, 18, 4 - head % 2);
  }
  std::vector<SequenceKv> sequences = {sequence.kv};
  test.run(&Device::streamed_attention, args(sequences));
  const auto all = std::pair(out, lse);
  for (int head = 0; head < s.num_kv_heads; ++head) {
    sequences[0] = one_head(sequence.kv, head);
    DecodeAttentionArgs one = args(sequences);
    const auto first = static_cast<std::ptrdiff_t>(head) * s.group;
    one.q = q.data() + first * s.head_dim;
    one.out = out.data() + first * s.head_dim;
    one.lse = lse.data() + first;
    one.num_heads = s.group;
    one.num_kv_heads = 1;
    test.run(&Device::streamed_attention, one);
    for (std::ptrdiff_t i = first; i < first + s.group; ++i) {
      ASSERT_EQ(lse[static_cast<std::size_t>(i)], all.second[static_cast<std::size_t>(i)]) << i;
    }
    for (std::ptrdiff_t i = first * s.head_dim; i < (first + s.group) * s.head_dim; ++i) {
      ASSERT_EQ(out[static_cast<std::size_t>(i)], all.first[static_cast<std::size_t>(i)]) << i;
    }
  }
}

TEST_P(Decode, LeavesOutACorruptBlockAndCountsIt) {
  Sequence sequence(s, kLayers, 100, 4, 50);
  for (int head = 0; head < s.num_kv_heads; ++head) sequence.make_resident(kLayer, head, 6, 0);
  sequence.arena(kLayer, 0, 3)[77] ^= std::byte{1};
  const std::vector<SequenceKv> sequences = {sequence.kv};
  sequence.mismatches = 4;
  test.run(&Device::streamed_attention, all_blocks(sequences));
  EXPECT_EQ(sequence.mismatches, 5U);
  for (int head = 0; head < num_heads; ++head) {
    const bool corrupt = head / s.group == 0;
    check(sequence, 0, head, {0, 1, 2, corrupt ? kAbsent : 3, 4, 5, 6}, by_block(0, head));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Decode, testing::ValuesIn(kShapes));

TEST(DecodeDeathTest, TheOpenBlockMustBeResident) {
  const Shape shape = kShapes[0];
  Sequence sequence(shape, 1, 100, 8, 1);
  std::vector<float> buffer(1000);
  TestDevice test(1);
  const DecodeAttentionArgs args{buffer.data(), &sequence.kv, 1, 0, 1, 1, 64, 1.0F,
                                 buffer.data(), buffer.data()};
  EXPECT_DEATH(test.run(&Device::decode_attention, args), "open");
}

}  // namespace
}  // namespace foretoken::kernels
