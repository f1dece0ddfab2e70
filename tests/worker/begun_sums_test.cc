// Sums over the ranks that go on beside prefill's products: nothing reads or writes what is under
// way. The CPU device's alone: here the data is out of reach until the sum ends.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "common/check.h"
#include "tests/worker/local_group.h"
#include "tests/worker/small_model.h"

namespace foretoken::worker {
namespace {

constexpr std::int64_t kArenaBytes = std::int64_t{64} << 20;

// Of one rank: a sum is what it was. Between begin_sum and end_sum there are no numbers.
class LateSums final : public Collective {
 public:
  explicit LateSums(int& begun) : num_begun_(begun) {}
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  void all_reduce(void*, std::size_t, kernels::Stream&) override {}
  bool begins_sums(std::size_t) const override { return true; }
  void begin_sum(void* data, std::size_t count, kernels::Stream& stream) override {
    stream.synchronize();
    FT_CHECK(under_way_.size() < kMaxBegun, under_way_.size());
    auto* values = static_cast<float*>(data);
    under_way_.push_back({values, {values, values + count}});
    std::fill_n(values, count, std::numeric_limits<float>::quiet_NaN());
    ++num_begun_;
  }
  void end_sum(kernels::Stream& stream) override {
    stream.synchronize();
    const auto& [data, values] = under_way_.front();
    for (std::size_t i = 0; i < values.size(); ++i) FT_CHECK(std::isnan(data[i]), i);
    std::ranges::copy(values, data);
    under_way_.pop_front();
  }
  void all_gather_columns(const float*, float*, int, std::span<const int>, float*,
                          kernels::Stream&) override {
    FT_CHECK(false);
  }

 private:
  struct UnderWay {
    float* data;
    std::vector<float> values;
  };
  int& num_begun_;
  std::deque<UnderWay> under_way_;
};

class BegunSums : public testing::TestWithParam<int> {};  // tokens of an item; 0: whole layers

TEST_P(BegunSums, EndBeforeAnybodyLooks) {
  ModelConfig model = small_model();
  model.max_position = 4096;
  for (const char* policy : {"full", "attention-predictor"}) {
    ServiceConfig config = service(policy, 512);
    if (config.device != "cpu") GTEST_SKIP() << "reads the device's memory";
    config.max_batched_tokens = 2048;
    const std::vector<TokenId> prompt = random_prompt(3300, 7);
    const LocalGroup::Options options{.max_tokens = 6, .tokens_per_item = GetParam()};
    const StoreProcess store(kArenaBytes);
    LocalGroup plain(config, model, store);
    const Answer expected = plain.generate(prompt, options);
    int begun = 0;
    const StoreProcess other_store(kArenaBytes);
    LocalGroup late(config, model, other_store, kernels::HistoryType::kBf16,
                    std::make_unique<LateSums>(begun));
    EXPECT_EQ(late.generate(prompt, options).tokens, expected.tokens) << policy;
    EXPECT_GE(begun, 4 * model.num_layers) << policy;
  }
}

// Who reads the rows next, as the logits of a decode step do, would read them in the middle of a
// sum.
TEST(BegunSumsOfDecode, AreNone) {
  constexpr int kRows = 2048;
  const ModelConfig config = small_model();
  const auto device = kernels::make_cpu_device({.num_threads = 2, .memory_bytes = 1 << 28});
  const auto stream = device->make_stream(kernels::StreamKind::kCompute);
  const Partition part = make_partition(config, 0, 1).value_or_throw();
  int begun = 0;
  LateSums sums(begun);
  LoadProgress progress(LoadProgress::Style::kNone);
  const auto weights = make_dummy_source(config);
  const auto model = Model::load(config, *weights, part, *device, sums, progress).value_or_throw();
  Activations act(*device, config, part, kRows, 1);  // as Decode has them
  const kernels::DeviceBuffer hidden(*device, model->hidden_bytes(kRows),
                                     kernels::MemoryUse::kActivations);
  std::fill_n(act.attn.as<float>(), act.attn.bytes() / sizeof(float), 1.0F);
  std::fill_n(hidden.as<float>(), hidden.bytes() / sizeof(float), 1.0F);
  model->finish_layer(0, kRows, act, hidden.data(), *stream);
  stream->synchronize();
  EXPECT_EQ(begun, 0);
}

INSTANTIATE_TEST_SUITE_P(Items, BegunSums, testing::Values(0, 1600, 2048));

}  // namespace
}  // namespace foretoken::worker
