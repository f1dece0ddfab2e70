// embed, rms_norm, swiglu and rope on the GPU against the CPU device.
#include "tests/kernels/cuda/cuda_test.h"
#include "tests/kernels/cuda/device_sequence.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

constexpr DataType kHalfTypes[] = {DataType::kBf16, DataType::kFp16};

// One rounding of the result, or two of one that falls between two values.
void expect_close(const std::vector<float>& actual, const std::vector<float>& expected,
                  DataType type) {
  ASSERT_EQ(actual.size(), expected.size());
  const double unit = type == DataType::kBf16 ? 1.0 / 256 : 1.0 / 2048;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], 2 * unit * std::max(1.0, std::abs(double{expected[i]})))
        << i;
  }
}

TEST_F(CudaTest, EmbedTakesRowsOfEveryType) {
  for (const DataType table_type : {DataType::kFp32, DataType::kFp16, DataType::kBf16}) {
    Pair pair;
    const auto bytes = reference::encode(random_floats(5 * 576, 1), table_type);
    const auto run = [&](DeviceUnderTest& on) {
      DeviceArray<std::byte> table(on, bytes);
      DeviceArray<TokenId> tokens(on, {14, 9, 10, 15});
      auto out = activations(on, std::vector<float>(4 * 576, 9));
      on.run(&Device::embed, EmbedArgs{.tokens = tokens.data(),
                                       .sequences = nullptr,
                                       .table = table.data(),
                                       .table_type = table_type,
                                       .first_token = 10,
                                       .table_tokens = 5,
                                       .num_tokens = 4,
                                       .hidden = 576,
                                       .out = out.data()});
      return floats_of(out, on.device->activation_type());
    };
    expect_close(run(pair.cuda), run(pair.cpu), DataType::kBf16);
  }
}

TEST_F(CudaTest, RmsNormAndSwiGlu) {
  for (const DataType type : kHalfTypes) {
    for (const int columns : {8, 576, 4096, 14336}) {
      Pair pair(type);
      const auto x = rounded(random_floats(static_cast<std::size_t>(3 * columns), 1, 2), type);
      const auto weight = random_floats(static_cast<std::size_t>(columns), 2);
      const auto norm = [&](DeviceUnderTest& on) {
        auto in = activations(on, x);
        DeviceArray<float> w(on, weight);
        on.run(&Device::rms_norm, RmsNormArgs{in.data(), w.data(), 1e-5F, 3, columns, in.data()});
        return floats_of(in, on.device->activation_type());
      };
      expect_close(norm(pair.cuda), norm(pair.cpu), type);
      if (columns % 16 != 0) continue;
      const auto swiglu = [&](DeviceUnderTest& on) {
        auto in = activations(on, x);
        auto out = activations(on, std::vector<float>(static_cast<std::size_t>(3 * columns / 2)));
        on.run(&Device::swiglu, SwiGluArgs{in.data(), 3, columns / 2, out.data()});
        return floats_of(out, on.device->activation_type());
      };
      expect_close(swiglu(pair.cuda), swiglu(pair.cpu), type);
    }
  }
}

struct RopeCase {
  int rows;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  bool norm;
  int begin;
};

class CudaRope : public CudaTest, public testing::WithParamInterface<RopeCase> {};

TEST_P(CudaRope, PrefillWritesTheScratch) {
  const RopeCase c = GetParam();
  const DataType type = DataType::kBf16;
  Pair pair(type);
  const int width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim;
  const auto qkv = rounded(random_floats(static_cast<std::size_t>(c.rows * width), 1), type);
  const auto norms = random_floats(static_cast<std::size_t>(2 * c.head_dim), 2);
  std::vector<float> inv_freq;
  for (int i = 0; i < c.head_dim / 2; ++i) {
    inv_freq.push_back(static_cast<float>(std::pow(5e5, -2.0 * i / c.head_dim)));
  }
  const int scratch_tokens = c.begin + c.rows + 3;
  const auto kv_values = static_cast<std::size_t>(c.num_kv_heads * scratch_tokens * c.head_dim);
  struct Result {
    std::vector<float> q, k, v;
  };
  const auto run = [&](DeviceUnderTest& on) {
    auto in = activations(on, qkv);
    DeviceArray<float> norm(on, norms);
    DeviceArray<float> freq(on, inv_freq);
    auto q = activations(
        on, std::vector<float>(static_cast<std::size_t>(c.rows * c.num_heads * c.head_dim)));
    DeviceArray<std::byte> k(on, std::vector<std::byte>(kv_values * 2));
    DeviceArray<std::byte> v(on, std::vector<std::byte>(kv_values * 2));
    RopePrefillArgs args{};
    args.qkv = in.data();
    args.q_norm = c.norm ? norm.data() : nullptr;
    args.k_norm = c.norm ? norm.data() + c.head_dim : nullptr;
    args.norm_eps = 1e-6F;
    args.inv_freq = freq.data();
    args.scale = 1.25F;
    args.rows = c.rows;
    args.num_heads = c.num_heads;
    args.num_kv_heads = c.num_kv_heads;
    args.head_dim = c.head_dim;
    args.q_out = q.data();
    args.kv_type = type;
    args.begin = c.begin;
    args.k_out = k.data();
    args.v_out = v.data();
    args.scratch_tokens = scratch_tokens;
    on.run(&Device::rope_prefill, args);
    return Result{floats_of(q, on.device->activation_type()), floats_of(k, type),
                  floats_of(v, type)};
  };
  const Result actual = run(pair.cuda);
  const Result expected = run(pair.cpu);
  expect_close(actual.q, expected.q, type);
  expect_close(actual.k, expected.k, type);
  expect_close(actual.v, expected.v, type);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaRope,
                         testing::Values(RopeCase{1, 9, 3, 64, false, 0},
                                         RopeCase{7, 32, 8, 128, false, 100},
                                         RopeCase{3, 14, 2, 64, true, 131000},
                                         RopeCase{130, 16, 8, 128, true, 5000}));

}  // namespace
}  // namespace foretoken::kernels
