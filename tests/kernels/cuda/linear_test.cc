// linear on the GPU against the CPU device: both of its ways (few rows, many rows), and what is
// fused into the product.
#include <algorithm>

#include "common/result.h"
#include "tests/kernels/cuda/cuda_test.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

struct Case {
  int rows;
  int columns;
  int features;
};

struct Inputs {
  Inputs(const Case& c, DataType type)
      : weights(reference::encode(
            random_floats(static_cast<std::size_t>(c.columns * c.features), 1, 0.1F), type)),
        x(rounded(random_floats(static_cast<std::size_t>(c.rows * c.columns), 2), type)),
        bias(random_floats(static_cast<std::size_t>(c.features), 3)),
        norm(random_floats(static_cast<std::size_t>(c.columns), 4)),
        residual(rounded(random_floats(static_cast<std::size_t>(c.rows * c.features), 5), type)) {}
  std::vector<std::byte> weights;
  std::vector<float> x, bias, norm, residual;
};

struct Fused {
  bool norm = false;
  bool bias = false;
  bool residual = false;
  bool swiglu = false;
  bool fp32 = false;
};

std::vector<float> run(DeviceUnderTest& on, const Case& c, const Inputs& setup, DataType type,
                       const Fused& fused) {
  const DataType activation = on.device->activation_type();
  const WeightPart parts[] = {
      {setup.weights.data(), type, c.features / 2, c.columns,
       2U * static_cast<unsigned>(c.columns)},
      {setup.weights.data() + 2 * c.columns * (c.features / 2), type, c.features - c.features / 2,
       c.columns, 2U * static_cast<unsigned>(c.columns)}};
  const auto weight = on.device->make_weight(parts);
  on.device->finish_uploads();
  const auto rows = static_cast<std::size_t>(c.rows);
  const auto zeros = [&](int columns, DataType of) {
    return DeviceArray<std::byte>(
        on, std::vector<std::byte>(rows * static_cast<std::size_t>(columns) * bytes_of(of)));
  };
  auto x = activations(on, setup.x);
  DeviceArray<float> bias(on, setup.bias);
  DeviceArray<float> norm(on, setup.norm);
  auto normed = zeros(c.columns, activation);
  auto product = zeros(c.features, activation);
  const DataType out_type = fused.fp32 ? DataType::kFp32 : activation;
  auto out = fused.residual ? activations(on, setup.residual)
                            : zeros(fused.swiglu ? c.features / 2 : c.features, out_type);
  LinearArgs args{.x = x.data(),
                  .weight = weight.get(),
                  .bias = fused.bias ? bias.data() : nullptr,
                  .rows = c.rows,
                  .out = out.data(),
                  .out_fp32 = fused.fp32};
  if (fused.norm) args.norm = {norm.data(), 1e-5F, normed.data()};
  if (fused.residual) args.residual = out.data();
  if (fused.swiglu) args.swiglu = {product.data()};
  on.run(&Device::linear, args);
  return floats_of(out, out_type);
}

class CudaLinear : public CudaTest, public testing::WithParamInterface<Case> {
 protected:
  // Values are sums of terms of about 0.1, so they grow with the root of the columns; the GPU
  // rounds them, and what lies between fused parts, to 8 (bf16) or 11 (fp16) bits.
  void expect_equal(DataType type, const Fused& fused) {
    const Case c = GetParam();
    const Inputs setup(c, type);
    Pair pair(type);
    const auto expected = run(pair.cpu, c, setup, type, fused);
    const auto actual = run(pair.cuda, c, setup, type, fused);
    ASSERT_EQ(actual.size(), expected.size());
    double largest = 1;
    for (const float value : expected) largest = std::max(largest, std::abs(double{value}));
    const double unit = type == DataType::kBf16 ? 1.0 / 256 : 1.0 / 2048;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      ASSERT_NEAR(actual[i], expected[i], 2 * unit * largest) << i;
    }
  }
};

TEST_P(CudaLinear, Plain) {
  for (const DataType type : {DataType::kBf16, DataType::kFp16}) expect_equal(type, {});
}
TEST_P(CudaLinear, IntoFp32) { expect_equal(DataType::kBf16, {.norm = true, .fp32 = true}); }
TEST_P(CudaLinear, WithNormAndBias) {
  expect_equal(DataType::kBf16, {.norm = true, .bias = true});
  expect_equal(DataType::kFp16, {.norm = true, .bias = true});
}
TEST_P(CudaLinear, WithResidualInPlace) {
  expect_equal(DataType::kBf16, {.residual = true});
  expect_equal(DataType::kBf16, {.bias = true, .residual = true});
}
TEST_P(CudaLinear, WithSwiGlu) {
  if (GetParam().features % 16 != 0) GTEST_SKIP() << "no such gate";
  expect_equal(DataType::kBf16, {.norm = true, .swiglu = true});
  expect_equal(DataType::kBf16, {.norm = true, .bias = true, .swiglu = true});
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaLinear,
                         testing::Values(Case{1, 64, 96}, Case{1, 576, 960}, Case{1, 4096, 1024},
                                         Case{2, 96, 50}, Case{3, 1536, 576}, Case{8, 4096, 512},
                                         Case{5, 14336, 48}, Case{4, 40, 17}, Case{7, 2056, 2500},
                                         Case{8, 1024, 33}, Case{9, 576, 1536}, Case{33, 896, 128},
                                         Case{200, 512, 640}, Case{65, 2048, 96},
                                         Case{1030, 256, 200}, Case{1, 40, 64}),
                         [](const auto& param) {
                           return std::to_string(param.param.rows) + "x" +
                                  std::to_string(param.param.columns) + "x" +
                                  std::to_string(param.param.features);
                         });

TEST_F(CudaTest, Fp32WeightsAreConverted) {
  Pair pair(DataType::kFp16);
  const auto values = rounded(random_floats(64 * 32, 1), DataType::kFp16);
  const WeightPart part{reinterpret_cast<const std::byte*>(values.data()), DataType::kFp32, 32, 64,
                        256};
  const auto x = rounded(random_floats(64, 2), DataType::kFp16);
  const auto product = [&](DeviceUnderTest& on) {
    const auto weight = on.device->make_weight({&part, 1});
    on.device->finish_uploads();
    auto in = activations(on, x);
    DeviceArray<float> out(on, std::vector<float>(32));
    on.run(&Device::linear, LinearArgs{in.data(), weight.get(), nullptr, 1, out.data(), true});
    return out.get();
  };
  const auto expected = product(pair.cpu);
  const auto actual = product(pair.cuda);
  for (std::size_t i = 0; i < 32; ++i) EXPECT_NEAR(actual[i], expected[i], 1e-3);
}

TEST_F(CudaTest, MemoryIsAccounted) {
  Pair pair;
  {
    const DeviceBuffer buffer(*pair.cuda.device, 1 << 20, MemoryUse::kKvSlots);
    EXPECT_EQ(pair.cuda.device->memory_in_use(MemoryUse::kKvSlots), 1U << 20);
  }
  EXPECT_EQ(pair.cuda.device->memory_in_use(MemoryUse::kKvSlots), 0U);
  try {
    const DeviceBuffer huge(*pair.cuda.device, std::size_t{1} << 44, MemoryUse::kKvSlots);
    FAIL() << "16 TiB were allocated";
  } catch (const Exception& failure) {
    EXPECT_EQ(failure.error().code, ErrorCode::kExhausted) << failure.what();
  }
}

TEST_F(CudaTest, ReadsPinnedMemoryIn) {
  Pair pair;
  for (DeviceUnderTest* on : {&pair.cuda, &pair.cpu}) {
    auto* pinned = static_cast<float*>(on->device->allocate_pinned(40'000));
    for (const std::size_t count : {std::size_t{0}, std::size_t{2}, std::size_t{10'000}}) {
      const std::vector<float> values = random_floats(count, 7);
      std::ranges::copy(values, pinned);
      DeviceArray<float> to(*on, std::vector<float>(count + 1, 5));
      on->device->read_in(to.data(), pinned, count * sizeof(float), *on->stream);
      std::vector<float> expected = values;
      expected.push_back(5);
      EXPECT_EQ(to.get(), expected);
    }
    on->device->release_pinned(pinned);
  }
}

TEST_F(CudaTest, AGraphRunsTheRecordedOpsAgain) {
  Pair pair;
  Device& device = *pair.cuda.device;
  Stream& stream = *pair.cuda.stream;
  const auto side = device.make_stream(StreamKind::kCopy);
  const auto forked = device.make_event();
  const auto joined = device.make_event();
  DeviceArray<float> from(pair.cuda, {1, 2, 3});
  DeviceArray<float> through(pair.cuda, {0, 0, 0});
  DeviceArray<float> to(pair.cuda, {0, 0, 0});
  const auto ops = [&] {
    forked->record(stream);
    forked->wait(*side);
    device.copy(through.data(), from.data(), 12, *side);
    joined->record(*side);
    joined->wait(stream);
    device.copy(to.data(), through.data(), 12, stream);
  };
  const auto graph = device.record(stream, ops);
  stream.synchronize();
  EXPECT_EQ(to.get(), (std::vector<float>{0, 0, 0})) << "recording runs nothing";
  graph->launch(stream);
  stream.synchronize();
  EXPECT_EQ(to.get(), (std::vector<float>{1, 2, 3}));
  from.set({4, 5, 6});
  graph->launch(stream);
  stream.synchronize();
  EXPECT_EQ(to.get(), (std::vector<float>{4, 5, 6}));
}

}  // namespace
}  // namespace foretoken::kernels
