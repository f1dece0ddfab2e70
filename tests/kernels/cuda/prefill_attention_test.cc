// Prefill attention (cuDNN) and block maxima of the CUDA device against those of the CPU device.
#include "kernels/cuda/prefill_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "common/check.h"
#include "common/result.h"
#include "tests/kernels/cuda/cuda_test.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

struct Shape {
  int num_kv_heads;
  int group;
  int head_dim;
  DataType type;  // of activations and KV
};
void PrintTo(const Shape& s, std::ostream* out) {
  *out << s.num_kv_heads << " KV heads x " << s.group << ", head_dim " << s.head_dim << ", "
       << name_of(s.type);
}

// What there is memory for: cuDNN's kernels are others where it is whole tiles of 128.
struct Room {
  int max_rows;
  int scratch_tokens;
};
constexpr Room kOddRoom{650, 1350};
constexpr Room kEvenRoom{640, 1408};

struct Chunk {
  int begin;
  int rows;
  int end() const { return begin + rows; }
};
std::string name_of(const Chunk& chunk) {
  return std::to_string(chunk.begin) + " + " + std::to_string(chunk.rows);
}

// What the chunks of a test are made of: encoding takes longer than all else.
struct Values {
  Values(const Shape& s, int rows, int tokens)
      : shape(s),
        q(reference::encode(random_floats(count(rows, s.num_kv_heads * s.group), 1), s.type)),
        k(reference::encode(random_floats(count(tokens, s.num_kv_heads), 2), s.type)),
        v(reference::encode(random_floats(count(tokens, s.num_kv_heads), 3), s.type)) {}

  std::size_t count(int vectors, int heads) const {
    return static_cast<std::size_t>(vectors) * static_cast<std::size_t>(heads * shape.head_dim);
  }

  Shape shape;
  std::vector<std::byte> q;  // [rows, heads, head_dim]
  std::vector<std::byte> k;  // [KV heads, tokens, head_dim]
  std::vector<std::byte> v;
};

// q, k and v of a chunk on a device. What nobody may look at is NaN.
struct Inputs {
  Inputs(DeviceUnderTest& on, const Values& values, const Chunk& chunk, const Room& room)
      : q(queries(on, values, chunk, room)),
        k(keys(on, values, values.k, chunk, room)),
        v(keys(on, values, values.v, chunk, room)) {}

  static DeviceArray<std::byte> queries(DeviceUnderTest& on, const Values& values,
                                        const Chunk& chunk, const Room& room) {
    const Shape& s = values.shape;
    const int heads = s.num_kv_heads * s.group;
    const DataType type = on.device->activation_type();
    // All bits set are NaN in all types.
    std::vector<std::byte> all(values.count(room.max_rows, heads) * bytes_of(type),
                               std::byte{0xFF});
    const std::size_t used = values.count(chunk.rows, heads);
    FT_CHECK(used * bytes_of(s.type) <= values.q.size());
    if (type == DataType::kFp32) {
      for (std::size_t i = 0; i < used; ++i) {
        const auto x = static_cast<float>(reference::decode_at(values.q.data(), s.type, i));
        std::memcpy(all.data() + i * sizeof x, &x, sizeof x);
      }
    } else {
      std::copy_n(values.q.begin(), used * bytes_of(type), all.begin());
    }
    return {on, all};
  }
  static DeviceArray<std::byte> keys(DeviceUnderTest& on, const Values& values,
                                     const std::vector<std::byte>& from, const Chunk& chunk,
                                     const Room& room) {
    const auto bytes = [&](int tokens) { return values.count(tokens, 1) * 2; };
    const auto heads = static_cast<std::size_t>(values.shape.num_kv_heads);
    const std::size_t head_bytes = from.size() / heads;
    FT_CHECK(bytes(chunk.end()) <= head_bytes);
    std::vector<std::byte> all(heads * bytes(room.scratch_tokens), std::byte{0xFF});
    for (std::size_t head = 0; head < heads; ++head) {
      std::memcpy(all.data() + head * bytes(room.scratch_tokens), from.data() + head * head_bytes,
                  bytes(chunk.end()));
    }
    return {on, all};
  }

  DeviceArray<std::byte> q;
  DeviceArray<std::byte> k;
  DeviceArray<std::byte> v;
};

struct Attended {
  std::vector<float> out;  // [rows, heads, head_dim]
  std::vector<float> lse;  // [heads, rows]
};

// A chunk on a device, with room for its results.
struct Problem {
  Problem(DeviceUnderTest& on, const Values& values, const Chunk& chunk, const Room& room)
      : in(on, values, chunk, room),
        out(on, std::vector<std::byte>(values.count(room.max_rows, heads(values.shape)) *
                                           bytes_of(on.device->activation_type()),
                                       std::byte{0xFF})),
        lse(on, std::vector<float>(static_cast<std::size_t>(heads(values.shape) * room.max_rows),
                                   -99.0F)),
        args{in.q.data(),
             in.k.data(),
             in.v.data(),
             values.shape.type,
             room.scratch_tokens,
             chunk.begin,
             chunk.rows,
             room.max_rows,
             heads(values.shape),
             values.shape.num_kv_heads,
             values.shape.head_dim,
             1 / std::sqrt(static_cast<float>(values.shape.head_dim)),
             out.data(),
             lse.data()} {}

  static int heads(const Shape& s) { return s.num_kv_heads * s.group; }

  Attended results(DataType activation) const {
    Attended all{floats_of(out, activation), lse.get()};
    all.out.resize(static_cast<std::size_t>(args.rows * args.num_heads * args.head_dim));
    std::vector<float> packed;
    for (int head = 0; head < args.num_heads; ++head) {
      const auto row = all.lse.begin() + head * args.max_rows;
      packed.insert(packed.end(), row, row + args.rows);
    }
    return {std::move(all.out), std::move(packed)};
  }

  Inputs in;
  DeviceArray<std::byte> out;
  DeviceArray<float> lse;
  PrefillAttentionArgs args;
};

Attended attend(DeviceUnderTest& on, const Values& values, const Chunk& chunk, const Room& room) {
  const Problem problem(on, values, chunk, room);
  on.run(&Device::prefill_attention, problem.args);
  return problem.results(on.device->activation_type());
}
Attended cpu_attend(DeviceUnderTest& cpu, const Values& values, const Chunk& chunk) {
  return attend(cpu, values, chunk, {chunk.rows, chunk.end()});
}

void expect_near(const Attended& got, const Attended& want, DataType type) {
  // The weights and the output are rounded to the type; values are about 1.
  const double tolerance = type == DataType::kBf16 ? 2e-2 : 3e-3;
  ASSERT_EQ(got.out.size(), want.out.size());
  for (std::size_t i = 0; i < want.out.size(); ++i) {
    ASSERT_NEAR(got.out[i], want.out[i], tolerance) << i;
  }
  for (std::size_t i = 0; i < want.lse.size(); ++i) ASSERT_NEAR(got.lse[i], want.lse[i], 1e-3) << i;
}

std::vector<float> block_maxima(DeviceUnderTest& on, const Values& values, const Chunk& chunk) {
  const Shape& s = values.shape;
  const Room room{chunk.rows, chunk.end() + 5};
  const Inputs in(on, values, chunk, room);
  const int heads = s.num_kv_heads * s.group;
  const int pitch = blocks_for(chunk.end()) + 5;
  const DeviceArray<float> out(
      on, std::vector<float>(static_cast<std::size_t>(heads * chunk.rows * pitch), NAN));
  on.run(&Device::prefill_block_max,
         PrefillBlockMaxArgs{in.q.data(), in.k.data(), s.type, room.scratch_tokens, chunk.begin,
                             chunk.rows, heads, s.num_kv_heads, s.head_dim,
                             1 / std::sqrt(static_cast<float>(s.head_dim)), out.data(), pitch});
  return out.get();
}

class CudaPrefill : public CudaTest, public testing::WithParamInterface<Shape> {};

TEST_P(CudaPrefill, AttentionEqualsTheCpus) {
  const Shape s = GetParam();
  Pair pair(s.type);
  const Values values(s, kOddRoom.max_rows, kOddRoom.scratch_tokens);
  for (const Chunk chunk : {Chunk{0, 1}, {0, 17}, {0, 128}, {100, 1}, {250, 61}, {700, 600}}) {
    SCOPED_TRACE(name_of(chunk));
    const Attended want = cpu_attend(pair.cpu, values, chunk);
    for (const Room room : {kOddRoom, kEvenRoom}) {
      expect_near(attend(pair.cuda, values, chunk, room), want, s.type);
    }
    Problem without_lse(pair.cuda, values, chunk, kOddRoom);
    without_lse.args.lse = nullptr;
    pair.cuda.run(&Device::prefill_attention, without_lse.args);
    expect_near({without_lse.results(pair.cuda.device->activation_type()).out, want.lse}, want,
                s.type);
  }
}

TEST_P(CudaPrefill, AttentionOfWholeChunksEqualsTheCpus) {
  const Shape s = GetParam();
  Pair pair(s.type);
  const Values values(s, kOddRoom.max_rows, kOddRoom.scratch_tokens);
  for (const Room room : {kOddRoom, kEvenRoom}) {
    for (const int begin : {0, room.max_rows}) {
      const Chunk chunk{begin, room.max_rows};
      SCOPED_TRACE(name_of(chunk));
      expect_near(attend(pair.cuda, values, chunk, room), cpu_attend(pair.cpu, values, chunk),
                  s.type);
    }
  }
}

TEST_P(CudaPrefill, BlockMaximaEqualTheCpus) {
  const Shape s = GetParam();
  Pair pair(s.type);
  const Values values(s, 64, 1563);
  for (const Chunk chunk : {Chunk{0, 1}, {0, 16}, {0, 64}, {230, 64}, {127, 2}, {1500, 63}}) {
    SCOPED_TRACE(name_of(chunk));
    const std::vector<float> want = block_maxima(pair.cpu, values, chunk);
    const std::vector<float> got = block_maxima(pair.cuda, values, chunk);
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (std::isinf(want[i])) {
        ASSERT_EQ(got[i], want[i]) << i;
      } else {
        ASSERT_NEAR(got[i], want[i], 2e-5) << i;  // products are exact, only sums are rounded
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaPrefill,
                         testing::Values(Shape{1, 1, 64, DataType::kFp16},
                                         Shape{3, 3, 64, DataType::kBf16},
                                         Shape{2, 4, 128, DataType::kBf16},
                                         Shape{1, 7, 128, DataType::kFp16},
                                         Shape{2, 2, 96, DataType::kBf16}));

class CudaPrefillAttention : public CudaTest {
 protected:
  // REQUIRES: values of bf16.
  static void expect_the_cpus(Pair& pair, cuda::PrefillAttention& attention, const Values& values,
                              const Chunk& chunk, const Room& room) {
    SCOPED_TRACE(name_of(chunk));
    const Problem problem(pair.cuda, values, chunk, room);
    attention.run(problem.args, DataType::kBf16, cuda::as_cuda(*pair.cuda.stream));
    expect_near(problem.results(DataType::kBf16), cpu_attend(pair.cpu, values, chunk),
                DataType::kBf16);
  }
};

TEST_F(CudaPrefillAttention, WantsActivationsAndKvOfOneType) {
  Pair pair(DataType::kBf16);
  const Values values({1, 1, 64, DataType::kFp16}, 4, 4);
  EXPECT_THROW(attend(pair.cuda, values, {0, 4}, kOddRoom), Exception);
}

// A plan takes up to 76 ms to make, in which nobody gets a token.
TEST_F(CudaPrefillAttention, CutChunksShareFewPlans) {
  Pair pair(DataType::kBf16);
  const Room room{2500, 6000};
  const Values values({1, 2, 64, DataType::kBf16}, room.max_rows, room.scratch_tokens);
  cuda::PrefillAttention attention;
  const auto expect_right = [&](const Chunk& chunk) {
    expect_the_cpus(pair, attention, values, chunk, room);
  };
  std::size_t plans = 0;
  for (const auto& [fewest, most] :
       {std::pair{1, 128}, {129, 256}, {257, 512}, {513, 1024}, {1025, 2048}, {2049, 2499}}) {
    ++plans;
    for (const int rows : {fewest, most - 1, most}) {
      for (const int begin : {0, 63, 777 + rows}) {
        expect_right({begin, rows});
        EXPECT_EQ(attention.num_plans(), plans) << rows << " rows";
      }
    }
  }
  expect_right({777, 2500});  // whole, but where a cut left it
  EXPECT_EQ(attention.num_plans(), plans);
  for (const int begin : {0, 2500, 0, 2500}) expect_right({begin, 2500});
  EXPECT_EQ(attention.num_plans(), plans + 2);
}

TEST_F(CudaPrefillAttention, AllPlansCanBeMadeBefore) {
  Pair pair(DataType::kBf16);
  const Room room{300, 950};
  const std::vector<Chunk> chunks{{0, 300}, {600, 300}, {300, 300}, {7, 300}, {900, 50}, {3, 200}};
  const Values values({1, 2, 64, DataType::kBf16}, room.max_rows, room.scratch_tokens);
  cuda::PrefillAttention attention;
  const auto expect_right = [&](const Chunk& chunk) {
    expect_the_cpus(pair, attention, values, chunk, room);
  };
  std::jthread preparing = attention.prepare(
      {DataType::kBf16, room.scratch_tokens, room.max_rows, 2, 1, 64, 1 / std::sqrt(64.0F), true});
  expect_right(chunks[1]);  // one of the last that are made
  preparing.join();
  constexpr std::size_t kPlans = 6;  // of 128, 256 and 300 rows; three whole chunks
  EXPECT_EQ(attention.num_plans(), kPlans);
  for (const Chunk& chunk : chunks) expect_right(chunk);
  EXPECT_EQ(attention.num_plans(), kPlans);

  cuda::PrefillAttention ends_before;
  const std::jthread stopped = ends_before.prepare(
      {DataType::kBf16, room.scratch_tokens, room.max_rows, 4, 1, 64, 1 / std::sqrt(64.0F), true});
}

// At the size that prefill is about; the CPU would take minutes, so single rows stand for all.
TEST_F(CudaPrefillAttention, ALongContextEqualsTheFormula) {
  Pair pair(DataType::kBf16);
  const Shape s{1, 2, 128, DataType::kBf16};
  const Chunk chunk{30000, 2048};
  const Room room{2048, 32768};
  const Values values(s, chunk.rows, chunk.end());
  const Attended got = attend(pair.cuda, values, chunk, room);
  for (const int row : {0, 1, 777, 2046, 2047}) {
    for (int head = 0; head < 2; ++head) {
      const auto at = static_cast<std::size_t>((row * 2 + head) * s.head_dim);
      const auto value = [&](const std::vector<std::byte>& from, int t, int d) {
        return reference::decode_at(from.data(), s.type, static_cast<std::size_t>(t * 128 + d));
      };
      std::vector<float> q;
      for (std::size_t d = 0; d < 128; ++d) {
        q.push_back(static_cast<float>(reference::decode_at(values.q.data(), s.type, at + d)));
      }
      const auto want = reference::attend(
          q, chunk.begin + row + 1, 1 / std::sqrt(128.0),
          [&](int t, int d) { return value(values.k, t, d); },
          [&](int t, int d) { return value(values.v, t, d); });
      for (std::size_t d = 0; d < 128; ++d) ASSERT_NEAR(got.out[at + d], want.out[d], 2e-4);
      ASSERT_NEAR(got.lse[static_cast<std::size_t>(head * chunk.rows + row)], want.lse, 1e-3);
    }
  }
}

}  // namespace
}  // namespace foretoken::kernels
