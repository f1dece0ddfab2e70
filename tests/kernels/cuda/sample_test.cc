// Sampling on the CUDA device against the CPU device: the same tokens under every mixture of
// penalties, filters and temperatures, and the same reports.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <limits>
#include <random>
#include <vector>

#include "tests/kernels/cuda/cuda_test.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261123;
// The normalizer's terms are of float accuracy on the GPU, of double accuracy on the CPU.
constexpr float kLogprobTolerance = 4e-6F;

constexpr SampleRow kGreedy{.seed = 7};

// A row and the tokens before it, as the host has them.
struct HostRow {
  SampleRow row = kGreedy;
  std::vector<TokenId> tokens;  // and room for one more
};

// What a GPU counts the tokens of rows with a penalty in: whatever it holds is overwritten.
DeviceArray<std::uint32_t> counts_for(DeviceUnderTest& on, int num_rows, int vocab) {
  const auto size = static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(vocab);
  return {on, std::vector<std::uint32_t>(size, 77)};
}

struct Drawn {
  std::vector<SampledToken> sampled;
  std::vector<std::vector<TokenId>> tokens;
};

Drawn draw(DeviceUnderTest& on, const std::vector<float>& logits, int vocab,
           const std::vector<HostRow>& rows) {
  const DeviceArray<float> device_logits(on, logits);
  std::deque<DeviceArray<TokenId>> tokens;
  std::vector<SampleRow> device_rows;
  const DeviceArray<SampledToken> out(on, std::vector<SampledToken>(rows.size()));
  for (const HostRow& host : rows) {
    tokens.emplace_back(on, host.tokens);
    device_rows.push_back(host.row);
    device_rows.back().tokens = tokens.back().data();
    device_rows.back().out = out.data() + device_rows.size() - 1;
  }
  const DeviceArray<SampleRow> row_array(on, device_rows);
  const auto num_rows = static_cast<int>(rows.size());
  const auto counts = counts_for(on, num_rows, vocab);
  on.run(&Device::sample,
         SampleArgs{device_logits.data(), row_array.data(), num_rows, vocab, counts.data()});
  Drawn drawn{out.get(), {}};
  for (const auto& array : tokens) drawn.tokens.push_back(array.get());
  return drawn;
}

void expect_equal(const Drawn& cuda, const Drawn& cpu) {
  for (std::size_t i = 0; i < cpu.sampled.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "row " << i);
    const SampledToken& actual = cuda.sampled[i];
    const SampledToken& expected = cpu.sampled[i];
    EXPECT_EQ(actual.token, expected.token);
    if (std::isinf(expected.logprob)) {
      EXPECT_EQ(actual.logprob, expected.logprob);
    } else {
      EXPECT_NEAR(actual.logprob, expected.logprob, kLogprobTolerance);
    }
    ASSERT_EQ(actual.num_top, expected.num_top);
    for (int top = 0; top < expected.num_top; ++top) {
      EXPECT_EQ(actual.top_ids[top], expected.top_ids[top]) << top;
      EXPECT_NEAR(actual.top_logprobs[top], expected.top_logprobs[top], kLogprobTolerance);
    }
    EXPECT_EQ(cuda.tokens[i], cpu.tokens[i]);
  }
}

class RowMaker {
 public:
  explicit RowMaker(int vocab) : vocab_(vocab) {}

  // Logits of a language model's spread; where `tied`, of few values.
  std::vector<float> logits(int rows, bool tied) {
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(vocab_));
    for (float& value : values) value = tied ? std::round(normal(random_)) : normal(random_);
    return values;
  }
  HostRow row() {
    HostRow host;
    SampleRow& row = host.row;
    row.temperature = pick({0.0F, 0.3F, 0.7F, 1.0F, 1.5F});
    row.top_k = pick({0, 0, 1, 2, 40, 3000, 1'000'000});
    row.top_p = pick({1.0F, 1.0F, 0.1F, 0.9F, 0.999F, 1e-6F});
    row.min_p = pick({0.0F, 0.0F, 0.05F, 0.5F, 1.0F});
    row.seed = random_();
    row.position = static_cast<std::int64_t>(random_()) << 3;
    row.num_tokens = pick({0, 1, 50, 3000});
    row.num_prompt = row.num_tokens == 0 ? 0 : static_cast<int>(random_() % 1000) % row.num_tokens;
    for (int i = 0; i <= row.num_tokens; ++i) {
      host.tokens.push_back(static_cast<TokenId>(random_() % static_cast<unsigned>(vocab_)));
    }
    if (row.num_tokens > 1) host.tokens[0] = -1;  // no token
    if (random_() % 2 == 0) {
      row.repetition_penalty = pick({1.0F, 1.3F, 0.8F});
      row.presence_penalty = pick({0.0F, 0.6F, -0.5F});
      row.frequency_penalty = pick({0.0F, 0.1F});
    }
    row.append = random_() % 2 == 0;
    row.num_logprobs = pick({0, 0, 1, 20, 99});
    row.forced =
        random_() % 8 == 0 ? static_cast<TokenId>(random_() % static_cast<unsigned>(vocab_)) : -1;
    return host;
  }

 private:
  template <typename T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[random_() % from.size()];
  }

  int vocab_;
  std::mt19937 random_{kSeed};
};

class CudaSample : public CudaTest, public testing::WithParamInterface<int> {};

TEST_P(CudaSample, IsTheCpus) {
  const int vocab = GetParam();
  Pair pair;
  RowMaker maker(vocab);
  for (const int num_rows : {0, 1, 7, 64}) {
    for (const bool tied : {false, true}) {
      SCOPED_TRACE(testing::Message() << num_rows << (tied ? " tied rows" : " rows"));
      const auto logits = maker.logits(num_rows, tied);
      std::vector<HostRow> rows;
      for (int i = 0; i < num_rows; ++i) rows.push_back(maker.row());
      expect_equal(draw(pair.cuda, logits, vocab, rows), draw(pair.cpu, logits, vocab, rows));
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, CudaSample,
                         testing::Values(1, 2, 31, 129, 4096, 49152, 131'072, 152'064, 151'937));

class CudaSampleRow : public CudaTest {
 protected:
  // One row with these logits on both devices.
  void expect_equal_row(const std::vector<float>& logits, const SampleRow& row,
                        TokenId expected_token) {
    if (!pair) pair = std::make_unique<Pair>();
    const std::vector<HostRow> rows{{row, std::vector<TokenId>(4, 1)}};
    const int vocab = static_cast<int>(logits.size());
    const Drawn cuda = draw(pair->cuda, logits, vocab, rows);
    expect_equal(cuda, draw(pair->cpu, logits, vocab, rows));
    EXPECT_EQ(cuda.sampled[0].token, expected_token);
  }
  std::unique_ptr<Pair> pair;
};

// Of the second vocabulary the ends fill no 16 bytes.
TEST_F(CudaSampleRow, SaysLogitsThatAreNoNumbers) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const std::size_t vocab : {3000U, 3002U}) {
      for (const std::size_t at : {std::size_t{0}, std::size_t{1501}, vocab - 1}) {
        std::vector<float> logits(vocab, 1);
        logits[at] = bad;
        SampleRow row = kGreedy;
        row.num_logprobs = 3;
        row.num_tokens = 2;
        row.append = true;
        expect_equal_row(logits, row, 0);
        row.temperature = 1;
        expect_equal_row(logits, row, 0);
      }
    }
  }
}

// What stands for no logit inside the kernel is a logit too.
TEST_F(CudaSampleRow, TakesTheLowestNumberWhereAllAreIt) {
  for (const std::size_t vocab : {1U, 3U, 1000U, 40'001U}) {
    expect_equal_row(std::vector<float>(vocab, std::numeric_limits<float>::lowest()), kGreedy, 0);
  }
}

// A row that begins at any of the four floats of 16 bytes has the same logits, and so the same
// token and report; the best is the first, the last, or one of two that are equal.
TEST_F(CudaSampleRow, BeginsAnywhere) {
  Pair both;
  const int vocab = 5003;
  const std::vector<float> values = RowMaker(vocab).logits(1, false);
  for (const std::size_t best : {std::size_t{0}, std::size_t{2}, std::size_t{5002}}) {
    for (std::size_t shift = 0; shift < 4; ++shift) {
      std::vector<float> logits(shift, 99);
      logits.insert(logits.end(), values.begin(), values.end());
      logits[shift + best] = logits.back() = 20;
      logits.push_back(99);
      std::vector<SampledToken> sampled;
      for (DeviceUnderTest* on : {&both.cuda, &both.cpu}) {
        const DeviceArray<float> array(*on, logits);
        const DeviceArray<SampledToken> out(*on, {SampledToken{}});
        SampleRow row = kGreedy;
        row.out = out.data();
        const DeviceArray<SampleRow> rows(*on, {row});
        const auto counts = counts_for(*on, 1, vocab);
        on->run(&Device::sample,
                SampleArgs{array.data() + shift, rows.data(), 1, vocab, counts.data()});
        sampled.push_back(out.get()[0]);
      }
      EXPECT_EQ(sampled[0].token, static_cast<TokenId>(best)) << shift;
      EXPECT_EQ(sampled[1].token, static_cast<TokenId>(best)) << shift;
      EXPECT_NEAR(sampled[0].logprob, sampled[1].logprob, kLogprobTolerance) << shift;
    }
  }
}

// Which one is drawn says nothing, but it is one.
TEST_F(CudaSampleRow, DrawsATokenWhereScaledLogitsOverflow) {
  if (!pair) pair = std::make_unique<Pair>();
  const int vocab = 3000;
  const std::vector<float> logits = RowMaker(vocab).logits(1, false);
  SampleRow row = kGreedy;
  row.temperature = 1e-40F;
  row.num_tokens = 2;
  row.append = true;
  for (const float top_p : {1.0F, 0.9F}) {
    for (const int top_k : {0, 40}) {
      row.top_p = top_p;
      row.top_k = top_k;
      const std::vector<HostRow> rows{{row, std::vector<TokenId>(4, 1)}};
      const Drawn once = draw(pair->cuda, logits, vocab, rows);
      EXPECT_GE(once.sampled[0].token, 0);
      EXPECT_LT(once.sampled[0].token, vocab);
      EXPECT_EQ(once.tokens[0][2], once.sampled[0].token);
      EXPECT_EQ(draw(pair->cuda, logits, vocab, rows).tokens, once.tokens);
    }
  }
}

TEST_F(CudaSampleRow, TakesTheFirstOfTheBest) {
  std::vector<float> logits(5000, -2);
  logits[1234] = logits[1235] = logits[4999] = 5;
  SampleRow row = kGreedy;
  row.num_logprobs = 5;
  expect_equal_row(logits, row, 1234);
}

// Every logit is the same: one bucket holds them all, and ties decide everything.
TEST_F(CudaSampleRow, DrawsAmongEqualLogits) {
  const std::vector<float> logits(10'000, -3.5F);
  SampleRow row = kGreedy;
  row.temperature = 1;
  row.top_k = 100;
  row.top_p = 0.5F;  // tokens 0 .. 49
  if (!pair) pair = std::make_unique<Pair>();
  for (row.position = 0; row.position < 50; ++row.position) {
    const std::vector<HostRow> rows{{row, {0}}};
    const Drawn cuda = draw(pair->cuda, logits, 10'000, rows);
    expect_equal(cuda, draw(pair->cpu, logits, 10'000, rows));
    EXPECT_LT(cuda.sampled[0].token, 50);
  }
}

// A graph that samples twice in a row: nothing of the first draw is left in the way of the second.
TEST_F(CudaSampleRow, RunsInAGraph) {
  Pair both;
  Device& device = *both.cuda.device;
  Stream& stream = *both.cuda.stream;
  RowMaker maker(1000);
  const DeviceArray<float> logits(both.cuda, maker.logits(1, false));
  DeviceArray<TokenId> tokens(both.cuda, std::vector<TokenId>(10, 3));
  SampleRow row = kGreedy;
  row.temperature = 1;
  row.top_p = 0.9F;
  row.repetition_penalty = 1.2F;
  row.tokens = tokens.data();
  row.num_tokens = 4;
  row.append = true;
  const DeviceArray<SampledToken> out(both.cuda, {SampledToken{}});
  row.out = out.data();
  const DeviceArray<SampleRow> rows(both.cuda, {row});
  const auto counts = counts_for(both.cuda, 1, 1000);
  const auto step = [&] {
    device.sample({logits.data(), rows.data(), 1, 1000, counts.data()}, stream);
  };
  step();
  stream.synchronize();
  const TokenId first = out.get()[0].token;
  const auto graph = device.record(stream, step);
  graph->launch(stream);
  graph->launch(stream);
  stream.synchronize();
  EXPECT_EQ(out.get()[0].token, first);
  EXPECT_EQ(tokens.get()[4], first);
  EXPECT_EQ(tokens.get()[5], 3);
}

}  // namespace
}  // namespace foretoken::kernels
