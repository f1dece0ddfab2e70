// linear against the sum that it promises: every element in input order, with fused
// multiply-add, equal to the bit whatever the rows, threads and parts.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/reference.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

struct Case {
  int rows;
  int in;
  int out;
  DataType type;
};

class Linear : public testing::TestWithParam<Case> {};

std::vector<float> expected(const Case& c, const std::vector<float>& x,
                            const std::vector<std::byte>& weights, const std::vector<float>& bias) {
  std::vector<float> out;
  for (int row = 0; row < c.rows; ++row) {
    for (int o = 0; o < c.out; ++o) {
      float sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(o)];
      for (int i = 0; i < c.in; ++i) {
        const double weight =
            reference::decode_at(weights.data(), c.type, static_cast<std::size_t>(o * c.in + i));
        sum =
            std::fma(x[static_cast<std::size_t>(row * c.in + i)], static_cast<float>(weight), sum);
      }
      out.push_back(sum);
    }
  }
  return out;
}

// The weights in two parts, the second with a gap between its rows.
std::unique_ptr<Weight> in_parts(TestDevice& test, const Case& c,
                                 const std::vector<std::byte>& weights) {
  const std::size_t row_bytes = bytes_of(c.type) * static_cast<std::size_t>(c.in);
  const int first = c.out / 3;
  std::vector<std::byte> spaced(static_cast<std::size_t>(c.out - first) * (row_bytes + 6));
  for (int row = first; row < c.out; ++row) {
    std::copy_n(weights.data() + static_cast<std::size_t>(row) * row_bytes, row_bytes,
                spaced.data() + static_cast<std::size_t>(row - first) * (row_bytes + 6));
  }
  const WeightPart parts[] = {{weights.data(), c.type, first, c.in, row_bytes},
                              {spaced.data(), c.type, c.out - first, c.in, row_bytes + 6}};
  return test.device->make_weight(parts);
}

TEST_P(Linear, EqualsTheSumInOrder) {
  const Case c = GetParam();
  const auto x = random_floats(static_cast<std::size_t>(c.rows * c.in), 1);
  const auto values = random_floats(static_cast<std::size_t>(c.out * c.in), 2, 0.1F);
  const auto bias = random_floats(static_cast<std::size_t>(c.out), 3);
  const auto weights = reference::encode(values, c.type);
  for (const int threads : {1, 3}) {
    TestDevice test(threads);
    const auto weight = in_parts(test, c, weights);
    EXPECT_EQ(weight->rows, c.out);
    EXPECT_EQ(weight->columns, c.in);
    for (const bool with_bias : {false, true}) {
      std::vector<float> out(static_cast<std::size_t>(c.rows * c.out) + 1, 7.5F);
      test.run(&Device::linear, LinearArgs{x.data(), weight.get(),
                                           with_bias ? bias.data() : nullptr, c.rows, out.data()});
      EXPECT_EQ(out.back(), 7.5F);  // nothing is written past the end
      out.pop_back();
      EXPECT_EQ(out, expected(c, x, weights, with_bias ? bias : std::vector<float>{}));
    }
  }
}

// As in a checkpoint whose q_proj is of another type than its k_proj.
TEST(LinearOfTypes, EqualsTheProductOfTheSameValuesInFp32) {
  TestDevice test;
  const Case each{5, 70, 40, DataType::kFp32};
  const Case all{each.rows, each.in, 3 * each.out, DataType::kFp32};
  const auto x = random_floats(static_cast<std::size_t>(all.rows * all.in), 1);
  std::vector<std::vector<std::byte>> weights;
  std::vector<WeightPart> parts;
  std::vector<float> values;
  for (const DataType type : {DataType::kBf16, DataType::kFp32, DataType::kFp16}) {
    const auto count = static_cast<std::size_t>(each.out * each.in);
    weights.push_back(reference::encode(random_floats(count, 2, 0.1F), type));
    parts.push_back({weights.back().data(), type, each.out, each.in,
                     bytes_of(type) * static_cast<std::size_t>(each.in)});
    for (std::size_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(reference::decode_at(weights.back().data(), type, i)));
    }
  }
  const auto weight = test.device->make_weight(parts);
  std::vector<float> out(static_cast<std::size_t>(all.rows * all.out));
  test.run(&Device::linear, LinearArgs{x.data(), weight.get(), nullptr, all.rows, out.data()});
  EXPECT_EQ(out, expected(all, x, reference::encode(values, DataType::kFp32), {}));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DataType type : {DataType::kFp32, DataType::kFp16, DataType::kBf16}) {
    for (const int rows : {0, 1, 2, 3, 5, 6, 7, 8, 12, 13, 31, 200}) {
      all.push_back({rows, 64, 96, type});
      all.push_back({rows, 33, 50, type});
    }
    all.push_back({1, 576, 960, type});
    all.push_back({1, 1, 1, type});
    all.push_back({20, 1, 1, type});
    all.push_back({40, 700, 70, type});   // more features than are converted at a time
    all.push_back({385, 257, 33, type});  // three tasks of rows, a panel of one column
  }
  return all;
}
std::string case_name(const testing::TestParamInfo<Case>& param) {
  const Case& c = param.param;
  return std::string(name_of(c.type)) + "_" + std::to_string(c.rows) + "x" + std::to_string(c.in) +
         "x" + std::to_string(c.out);
}
INSTANTIATE_TEST_SUITE_P(Shapes, Linear, testing::ValuesIn(cases()), case_name);

// What is fused is what the ops give one after the other, to the bit.
TEST(FusedLinear, NormAndSwiGluAreTheirOps) {
  TestDevice test;
  for (const int rows : {1, 3, 30}) {
    const int in = 70;
    const int out = 66;
    const auto x = random_floats(static_cast<std::size_t>(rows * in), 1);
    const auto norm = random_floats(static_cast<std::size_t>(in), 2);
    const auto weights = random_floats(static_cast<std::size_t>(in * out), 3);
    const WeightPart part{reinterpret_cast<const std::byte*>(weights.data()), DataType::kFp32, out,
                          in, 4U * in};
    const auto weight = test.device->make_weight({&part, 1});
    std::vector<float> normed(x.size());
    std::vector<float> product(static_cast<std::size_t>(rows * out));
    std::vector<float> expected(product.size() / 2);
    test.run(&Device::rms_norm, RmsNormArgs{x.data(), norm.data(), 1e-5F, rows, in, normed.data()});
    test.run(&Device::linear,
             LinearArgs{normed.data(), weight.get(), nullptr, rows, product.data()});
    test.run(&Device::swiglu, SwiGluArgs{product.data(), rows, out / 2, expected.data()});

    std::vector<float> actual(expected.size());
    std::vector<float> normed_scratch(x.size());
    std::vector<float> product_scratch(product.size());
    test.run(&Device::linear, LinearArgs{.x = x.data(),
                                         .weight = weight.get(),
                                         .bias = nullptr,
                                         .rows = rows,
                                         .out = actual.data(),
                                         .norm = {norm.data(), 1e-5F, normed_scratch.data()},
                                         .swiglu = {product_scratch.data()}});
    EXPECT_EQ(actual, expected);
  }
}

TEST(FusedLinear, AddsToTheResidualInPlace) {
  TestDevice test;
  for (const int rows : {1, 5, 40}) {
    for (const int out : {64, 50}) {
      const int in = 700;
      const auto x = random_floats(static_cast<std::size_t>(rows * in), 1);
      const auto weights = random_floats(static_cast<std::size_t>(in * out), 2, 0.05F);
      const auto bias = random_floats(static_cast<std::size_t>(out), 3);
      const auto residual = random_floats(static_cast<std::size_t>(rows * out), 4);
      const WeightPart part{reinterpret_cast<const std::byte*>(weights.data()), DataType::kFp32,
                            out, in, 4U * in};
      const auto weight = test.device->make_weight({&part, 1});
      for (const bool with_bias : {false, true}) {
        std::vector<float> product(residual.size());
        LinearArgs args{x.data(), weight.get(), with_bias ? bias.data() : nullptr, rows,
                        product.data()};
        test.run(&Device::linear, args);
        std::vector<float> sum = residual;
        args.residual = args.out = sum.data();
        test.run(&Device::linear, args);
        for (std::size_t i = 0; i < sum.size(); ++i) {
          EXPECT_NEAR(sum[i], product[i] + residual[i], 1e-5) << i;
        }
      }
    }
  }
}

TEST(LinearMemory, IsAccountedAsWeights) {
  TestDevice test;
  const std::vector<float> values(32 * 10, 1);
  const WeightPart part{reinterpret_cast<const std::byte*>(values.data()), DataType::kFp32, 32, 10,
                        40};
  auto weight = test.device->make_weight({&part, 1});
  EXPECT_EQ(test.device->memory_in_use(MemoryUse::kWeights), 32U * 10 * 4);
  weight.reset();
  EXPECT_EQ(test.device->memory_in_use(MemoryUse::kWeights), 0U);
}

}  // namespace
}  // namespace foretoken::kernels
