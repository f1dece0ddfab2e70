// Sampling against plain definitions: which tokens may come, how often, and what is reported.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "kernels/device.h"
#include "kernels/philox.h"

namespace foretoken::kernels {
namespace {

constexpr SampleRow kGreedy{.seed = 7};

class Sample : public ::testing::Test {
 protected:
  SampledToken draw(const std::vector<float>& logits, SampleRow row) {
    SampledToken out{};
    row.out = &out;
    device_->sample({.logits = logits.data(),
                     .rows = &row,
                     .num_rows = 1,
                     .vocab = static_cast<int>(logits.size())},
                    *stream_);
    return out;
  }
  // Which tokens come over n positions.
  std::vector<int> histogram(const std::vector<float>& logits, SampleRow row, int n) {
    std::vector<int> counts(logits.size());
    for (int position = 0; position < n; ++position) {
      row.position = position;
      ++counts[static_cast<std::size_t>(draw(logits, row).token)];
    }
    return counts;
  }
  std::unique_ptr<Device> device_ = make_cpu_device({.num_threads = 1, .memory_bytes = 1 << 20});
  std::unique_ptr<Stream> stream_ = device_->make_stream(StreamKind::kCompute);
};

// The generator's published test vectors (Random123, kat_vectors: philox4x32 10).
TEST(Philox, MatchesItsTestVectors) {
  using Block = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST_F(Sample, GreedyTakesTheFirstOfTheBest) {
  const std::vector<float> logits{1, 5, 2, 5};
  const SampledToken out = draw(logits, kGreedy);
  EXPECT_EQ(out.token, 1);
  const double sum = std::exp(1) + 2 * std::exp(5) + std::exp(2);
  EXPECT_NEAR(out.logprob, 5 - std::log(sum), 1e-6);
}

TEST_F(Sample, ReportsTheBestLogprobsInOrder) {
  SampleRow row = kGreedy;
  row.num_logprobs = 3;
  const SampledToken out = draw({0, 3, 1, 2}, row);
  ASSERT_EQ(out.num_top, 3);
  EXPECT_EQ(out.top_ids[0], 1);
  EXPECT_EQ(out.top_ids[1], 3);
  EXPECT_EQ(out.top_ids[2], 2);
  EXPECT_NEAR(out.top_logprobs[0] - out.top_logprobs[1], 1, 1e-6);
}

TEST_F(Sample, DrawsInProportion) {
  SampleRow row = kGreedy;
  row.temperature = 1;
  const int n = 20000;
  const auto counts = histogram({std::log(0.5F), std::log(0.3F), std::log(0.2F)}, row, n);
  // Three standard deviations of a binomial.
  EXPECT_NEAR(counts[0], 0.5 * n, 3 * std::sqrt(n * 0.25));
  EXPECT_NEAR(counts[1], 0.3 * n, 3 * std::sqrt(n * 0.21));
  EXPECT_NEAR(counts[2], 0.2 * n, 3 * std::sqrt(n * 0.16));
}

TEST_F(Sample, IsAFunctionOfSeedAndPosition) {
  SampleRow row = kGreedy;
  row.temperature = 1;
  std::vector<float> logits(100, 0.0F);
  std::set<TokenId> seen;
  for (int position = 0; position < 50; ++position) {
    row.position = position;
    const TokenId first = draw(logits, row).token;
    EXPECT_EQ(draw(logits, row).token, first);
    seen.insert(first);
  }
  EXPECT_GT(seen.size(), 20U);
  row.position = 3;
  const TokenId before = draw(logits, row).token;
  row.seed = 8;
  EXPECT_NE(draw(logits, row).token, before);
}

TEST_F(Sample, FiltersLeaveTheRightTokens) {
  const std::vector<float> logits{std::log(0.4F), std::log(0.3F), std::log(0.2F), std::log(0.1F)};
  SampleRow row = kGreedy;
  row.temperature = 1;
  const auto kept = [&](const SampleRow& r) {
    std::set<int> tokens;
    const auto counts = histogram(logits, r, 2000);
    for (int i = 0; i < 4; ++i) {
      if (counts[static_cast<std::size_t>(i)] > 0) tokens.insert(i);
    }
    return tokens;
  };
  SampleRow top_k = row;
  top_k.top_k = 2;
  EXPECT_EQ(kept(top_k), (std::set<int>{0, 1}));
  SampleRow top_p = row;
  top_p.top_p = 0.65F;  // 0.4 + 0.3 reaches it
  EXPECT_EQ(kept(top_p), (std::set<int>{0, 1}));
  SampleRow min_p = row;
  min_p.min_p = 0.4F;  // at least 0.16
  EXPECT_EQ(kept(min_p), (std::set<int>{0, 1, 2}));
  SampleRow tiny = row;
  tiny.top_p = 1e-6F;  // the best one always stays
  EXPECT_EQ(kept(tiny), (std::set<int>{0}));
}

TEST_F(Sample, PenaltiesCountTheRightTokens) {
  std::vector<TokenId> tokens{0, 1, 1};  // prompt: 0; output: 1, 1
  SampleRow row = kGreedy;
  row.tokens = tokens.data();
  row.num_prompt = 1;
  row.num_tokens = 3;
  row.repetition_penalty = 2;
  EXPECT_EQ(draw({4, 4, 3}, row).token, 2) << "both seen tokens are halved to 2";
  EXPECT_EQ(draw({-1, -1, -1.5F}, row).token, 2) << "a negative logit is doubled";
  row.repetition_penalty = 1;
  row.frequency_penalty = 1;
  EXPECT_EQ(draw({2, 3.5F, 1}, row).token, 0) << "3.5 - 2 < 2: the prompt doesn't count";
  row.frequency_penalty = 0;
  row.presence_penalty = 1;
  EXPECT_EQ(draw({2, 3.5F, 1}, row).token, 1) << "3.5 - 1 > 2";
}

TEST_F(Sample, ForcedTokenIsTakenWithItsOwnLogprob) {
  SampleRow row = kGreedy;
  row.forced = 2;
  const SampledToken out = draw({5, 1, 0}, row);
  EXPECT_EQ(out.token, 2);
  EXPECT_NEAR(out.logprob, -std::log(std::exp(5) + std::exp(1) + 1), 1e-6);
}

TEST_F(Sample, LogitsThatAreNoNumbersAreSaid) {
  EXPECT_FALSE(std::isfinite(draw({1, NAN, 0}, kGreedy).logprob));
  EXPECT_FALSE(std::isfinite(draw({1, INFINITY, 0}, kGreedy).logprob));
}

TEST_F(Sample, PutsTheTokenWhereTheNextStepReadsIt) {
  std::vector<TokenId> tokens{5, 7, -1, -1};
  SampleRow row = kGreedy;
  row.tokens = tokens.data();
  row.num_tokens = 2;
  row.append = true;
  EXPECT_EQ(draw({0, 1, 4, 3}, row).token, 2);
  EXPECT_EQ(tokens, (std::vector<TokenId>{5, 7, 2, -1}));
}

}  // namespace
}  // namespace foretoken::kernels
