// Prefill attention (cuDNN) and block maxima of the CUDA device against those of the CPU device.
#include <cmath>
#include <limits>

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

struct Chunk {
  int begin;
  int rows;
};

// q, k and v of a chunk on a device. Tokens that nobody may read are NaN.
struct Inputs {
  Inputs(DeviceUnderTest& on, const Shape& s, const Chunk& chunk)
      : scratch_tokens(chunk.begin + chunk.rows + 5),
        q(activations(
            on, rounded(random_floats(count(chunk.rows, s.num_kv_heads * s.group, s), 1), s.type))),
        k(keys(on, s, chunk, 2)),
        v(keys(on, s, chunk, 3)) {}

  static std::size_t count(int tokens, int heads, const Shape& s) {
    return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(heads * s.head_dim);
  }
  DeviceArray<std::byte> keys(DeviceUnderTest& on, const Shape& s, const Chunk& chunk,
                              std::uint32_t seed) const {
    const auto values = random_floats(count(scratch_tokens, s.num_kv_heads, s), seed);
    auto bytes = reference::encode(values, s.type);
    const std::size_t head_bytes = count(scratch_tokens, 1, s) * 2;
    const std::size_t used = count(chunk.begin + chunk.rows, 1, s) * 2;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      if (i % head_bytes >= used) bytes[i] = std::byte{0x7F};  // 0x7F7F is NaN in fp16
      if (i % head_bytes >= used && s.type == DataType::kBf16) bytes[i] = std::byte{0xFF};
    }
    return {on, bytes};
  }

  int scratch_tokens;
  DeviceArray<std::byte> q;
  DeviceArray<std::byte> k;
  DeviceArray<std::byte> v;
};

struct Attended {
  std::vector<float> out;
  std::vector<float> lse;
};

Attended attend(DeviceUnderTest& on, const Shape& s, const Chunk& chunk, bool with_lse) {
  const Inputs in(on, s, chunk);
  const int heads = s.num_kv_heads * s.group;
  const DataType type = on.device->activation_type();
  const DeviceArray<std::byte> out(
      on, std::vector<std::byte>(Inputs::count(chunk.rows, heads, s) * bytes_of(type)));
  const DeviceArray<float> lse(
      on, std::vector<float>(static_cast<std::size_t>(heads * chunk.rows), -99.0F));
  on.run(&Device::prefill_attention,
         PrefillAttentionArgs{in.q.data(), in.k.data(), in.v.data(), s.type, in.scratch_tokens,
                              chunk.begin, chunk.rows, chunk.rows, heads, s.num_kv_heads,
                              s.head_dim, 1 / std::sqrt(static_cast<float>(s.head_dim)), out.data(),
                              with_lse ? lse.data() : nullptr});
  return {floats_of(out, type), lse.get()};
}

std::vector<float> block_maxima(DeviceUnderTest& on, const Shape& s, const Chunk& chunk) {
  const Inputs in(on, s, chunk);
  const int heads = s.num_kv_heads * s.group;
  const int pitch = blocks_for(chunk.begin + chunk.rows) + 5;
  const DeviceArray<float> out(
      on, std::vector<float>(static_cast<std::size_t>(heads * chunk.rows * pitch), NAN));
  on.run(&Device::prefill_block_max,
         PrefillBlockMaxArgs{in.q.data(), in.k.data(), s.type, in.scratch_tokens, chunk.begin,
                             chunk.rows, heads, s.num_kv_heads, s.head_dim,
                             1 / std::sqrt(static_cast<float>(s.head_dim)), out.data(), pitch});
  return out.get();
}

class CudaPrefill : public CudaTest, public testing::WithParamInterface<Shape> {};

TEST_P(CudaPrefill, AttentionEqualsTheCpus) {
  const Shape s = GetParam();
  Pair pair(s.type);
  // The weights and the output are rounded to the type; values are about 1.
  const double tolerance = s.type == DataType::kBf16 ? 2e-2 : 3e-3;
  for (const Chunk chunk : {Chunk{0, 1}, {0, 17}, {0, 128}, {100, 1}, {250, 61}, {1000, 1024}}) {
    SCOPED_TRACE(std::to_string(chunk.begin) + " + " + std::to_string(chunk.rows));
    const Attended want = attend(pair.cpu, s, chunk, true);
    const Attended got = attend(pair.cuda, s, chunk, true);
    ASSERT_EQ(got.out.size(), want.out.size());
    for (std::size_t i = 0; i < want.out.size(); ++i) {
      ASSERT_NEAR(got.out[i], want.out[i], tolerance) << i;
    }
    for (std::size_t i = 0; i < want.lse.size(); ++i) {
      ASSERT_NEAR(got.lse[i], want.lse[i], 1e-3) << i;
    }
    const Attended without_lse = attend(pair.cuda, s, chunk, false);
    for (std::size_t i = 0; i < want.out.size(); ++i) {
      ASSERT_NEAR(without_lse.out[i], want.out[i], tolerance) << i << ", without LSE";
    }
  }
}

TEST_P(CudaPrefill, BlockMaximaEqualTheCpus) {
  const Shape s = GetParam();
  Pair pair(s.type);
  for (const Chunk chunk : {Chunk{0, 1}, {0, 16}, {0, 64}, {230, 64}, {127, 2}, {1500, 63}}) {
    SCOPED_TRACE(std::to_string(chunk.begin) + " + " + std::to_string(chunk.rows));
    const std::vector<float> want = block_maxima(pair.cpu, s, chunk);
    const std::vector<float> got = block_maxima(pair.cuda, s, chunk);
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

class CudaPrefillAttention : public CudaTest {};

TEST_F(CudaPrefillAttention, WantsActivationsAndKvOfOneType) {
  Pair pair(DataType::kBf16);
  EXPECT_THROW(attend(pair.cuda, {1, 1, 64, DataType::kFp16}, {0, 4}, false), Exception);
}

// More shapes than the plan cache holds, and back to the first.
TEST_F(CudaPrefillAttention, MayForgetAPlan) {
  Pair pair(DataType::kBf16);
  const Shape s{1, 2, 64, DataType::kBf16};
  const Attended first = attend(pair.cuda, s, {0, 1}, true);
  for (int rows = 2; rows <= 520; ++rows) attend(pair.cuda, s, {rows, rows}, false);
  const Attended again = attend(pair.cuda, s, {0, 1}, true);
  EXPECT_EQ(again.out, first.out);
  EXPECT_EQ(again.lse, first.lse);
}

// At the size that prefill is about; the CPU would take minutes, so single rows stand for all.
TEST_F(CudaPrefillAttention, ALongContextEqualsTheFormula) {
  Pair pair(DataType::kBf16);
  const Shape s{1, 2, 128, DataType::kBf16};
  const Chunk chunk{30000, 2048};
  const Attended got = attend(pair.cuda, s, chunk, true);
  const Inputs in(pair.cuda, s, chunk);
  const auto q = floats_of(in.q, s.type);
  const auto k = floats_of(in.k, s.type);
  const auto v = floats_of(in.v, s.type);
  for (const int row : {0, 1, 777, 2046, 2047}) {
    for (int head = 0; head < 2; ++head) {
      const auto at = static_cast<std::size_t>((row * 2 + head) * s.head_dim);
      const auto value = [&](const std::vector<float>& from, int t, int d) {
        return from[static_cast<std::size_t>(t) * 128 + static_cast<std::size_t>(d)];
      };
      const auto want = reference::attend(
          std::span(q).subspan(at, 128), chunk.begin + row + 1, 1 / std::sqrt(128.0),
          [&](int t, int d) { return value(k, t, d); },
          [&](int t, int d) { return value(v, t, d); });
      for (std::size_t d = 0; d < 128; ++d) ASSERT_NEAR(got.out[at + d], want.out[d], 2e-4);
      ASSERT_NEAR(got.lse[static_cast<std::size_t>(head * chunk.rows + row)], want.lse, 1e-3);
    }
  }
}

}  // namespace
}  // namespace foretoken::kernels
