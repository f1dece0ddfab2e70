// Policies through their door, on the CPU device.
#include "predictor/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "kernels/cpu/best_blocks.h"
#include "tests/predictor/golden.h"

namespace foretoken::predictor {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr int kGroup = 2;

class PolicyTest : public testing::Test {
 protected:
  std::unique_ptr<Policy> make(const PolicyConfig& config, int kv_heads = 2, int layers = 1) {
    PolicyShape shape;
    shape.kv.num_layers = layers;
    shape.kv.num_kv_heads = kv_heads;
    shape.kv.head_dim = 64;
    shape.num_heads = kv_heads * kGroup;
    return make_policy(config, shape, *device_).value_or_throw();
  }
  static PolicyConfig predictor_config(PredictPer per) {
    PolicyConfig config;
    config.kind = PolicyKind::kAttentionPredictor;
    config.predict_per = per;
    config.history_type = kernels::HistoryType::kFp32;
    return config;
  }

  std::unique_ptr<kernels::Device> device_ = kernels::make_cpu_device({2, 0});
  std::unique_ptr<kernels::Stream> stream_ = device_->make_stream(kernels::StreamKind::kCompute);
};

TEST_F(PolicyTest, NamesAreThoseOfTheCommandLine) {
  for (const char* name : {"full", "streaming-llm", "attention-predictor", "oracle"}) {
    const auto kind = policy_from_name(name);
    ASSERT_TRUE(kind) << name;
    EXPECT_EQ(name_of(*kind), name);
  }
  EXPECT_FALSE(policy_from_name("attention_predictor"));
}

TEST_F(PolicyTest, ABudgetIsSinkAndLocalAndCriticalBlocks) {
  PolicyConfig config = predictor_config(PredictPer::kKvHead);
  EXPECT_EQ(make(config)->selected_per_head(), 56);
  config.predict_per = PredictPer::kQueryHead;
  EXPECT_EQ(make(config)->selected_per_head(), 56 * kGroup);
  config.budget_per = BudgetPer::kKvHead;
  EXPECT_EQ(make(config)->selected_per_head(), 56);
  config.kind = PolicyKind::kOracle;
  EXPECT_EQ(make(config)->selected_per_head(), 56);
  config.kind = PolicyKind::kStreamingLlm;
  EXPECT_EQ(make(config)->selected_per_head(), 56);
  config.kind = PolicyKind::kFull;
  EXPECT_EQ(make(config)->selected_per_head(), std::nullopt);
  config.budget_tokens = 0;
  EXPECT_EQ(make(config)->selected_per_head(), std::nullopt);
}

TEST_F(PolicyTest, ABudgetWithoutACriticalBlockIsAnError) {
  PolicyShape shape;
  shape.kv.num_layers = shape.kv.num_kv_heads = shape.num_heads = 1;
  for (const PolicyKind kind :
       {PolicyKind::kStreamingLlm, PolicyKind::kAttentionPredictor, PolicyKind::kOracle}) {
    PolicyConfig config;
    config.kind = kind;
    config.budget_tokens = 143;
    const auto policy = make_policy(config, shape, *device_);
    ASSERT_FALSE(policy);
    EXPECT_EQ(policy.error().code, ErrorCode::kConfig);
    EXPECT_THAT(policy.error().message, HasSubstr("143"));
    config.budget_tokens = 144;
    EXPECT_TRUE(make_policy(config, shape, *device_));
  }
}

TEST_F(PolicyTest, CalibratesByKeysWhereTheyCrossNoLink) {
  EXPECT_EQ(calibration_from_name("auto", *device_), Calibration::kExact);  // a CPU
  EXPECT_EQ(calibration_from_name("sketch", *device_), Calibration::kSketch);
  EXPECT_EQ(calibration_from_name("none", *device_), Calibration::kNone);
  EXPECT_EQ(calibration_from_name("maybe", *device_), std::nullopt);
  PolicyConfig config = predictor_config(PredictPer::kKvHead);
  config.calibration = Calibration::kSketch;
  EXPECT_EQ(make(config)->calibration(), Calibration::kSketch);
  config.kind = PolicyKind::kOracle;  // keeps no history
  EXPECT_EQ(make(config)->calibration(), Calibration::kNone);
}

TEST_F(PolicyTest, ATraceTakesThePlaceOfWhatThePredictorChose) {
  PolicyConfig config = predictor_config(PredictPer::kKvHead);
  config.trace_churn = 1.0F;
  const auto policy = make(config);
  const auto state = policy->admit(40'000, *stream_);
  std::int32_t length = 40'000 - 16;
  kernels::SequenceKv kv{};
  kv.length = &length;
  kv.shape.num_layers = 1;
  kv.shape.num_kv_heads = 2;
  const auto choose = [&] {
    policy->select_ahead({1, &kv, &state->history, &state->selection}, *stream_);
    return std::vector<std::int32_t>(state->selection.blocks, state->selection.blocks + 56);
  };
  const auto first = choose();
  ++length;
  const auto second = choose();
  EXPECT_EQ(state->selection.counts[0], 56);
  for (std::size_t i = 0; i < first.size(); ++i) EXPECT_NE(first[i], second[i]) << i;
}

TEST_F(PolicyTest, StateTakesTheBytesThatItAnnounced) {
  for (const PolicyKind kind : {PolicyKind::kFull, PolicyKind::kStreamingLlm,
                                PolicyKind::kAttentionPredictor, PolicyKind::kOracle}) {
    PolicyConfig config = predictor_config(PredictPer::kQueryHead);
    config.kind = kind;
    const auto policy = make(config);
    const auto state = policy->admit(1000, *stream_);
    EXPECT_EQ(device_->memory_in_use(kernels::MemoryUse::kHistory), policy->state_bytes(1000));
    EXPECT_EQ(state->history.num_layers, policy->observes() ? 1 : 0);
  }
  EXPECT_EQ(device_->memory_in_use(kernels::MemoryUse::kHistory), 0U);
}

// The golden data as logits against an LSE of 0, one KV head a golden map.
class GoldenRun : public PolicyTest {
 protected:
  void start(PredictPer per) {
    policy_ = make(predictor_config(per), golden_.maps);
    state_ = policy_->admit(golden_.columns * kBlockTokens, *stream_);
    // Both query heads of a group see the same attention, so their mean is the map.
    std::vector<float> block_max;
    for (int h = 0; h < golden_.maps * kGroup; ++h) {
      for (int r = 0; r < kernels::kHistoryRows; ++r) {
        for (const float p : golden_.prefill_row(h / kGroup, r)) block_max.push_back(std::log(p));
      }
    }
    observe(block_max, golden_.prefill_columns, golden_.prefill_columns, kernels::kHistoryRows);
  }

  void observe_step(int step) {
    std::vector<float> block_max;
    const auto rows = golden_.step_rows(step);
    for (int h = 0; h < golden_.maps * kGroup; ++h) {
      for (int c = 0; c < golden_.columns; ++c) {
        block_max.push_back(
            std::log(rows[static_cast<std::size_t>(h / kGroup * golden_.columns + c)]));
      }
    }
    observe(block_max, golden_.columns, blocks_for(golden_.length[static_cast<std::size_t>(step)]),
            1);
  }

  void observe(const std::vector<float>& block_max, int pitch, std::int32_t columns, int rows) {
    const std::vector<float> lse(static_cast<std::size_t>(golden_.maps * kGroup * rows), 0.0F);
    AttentionRows attention;
    attention.block_max = block_max.data();
    attention.lse = lse.data();
    attention.rows = rows;
    attention.pitch = pitch;
    attention.num_columns = &columns;
    if (rows > 1) {
      policy_->observe_prefill(&state_->history, 0, attention, *stream_);
    } else {
      policy_->observe_decode(batch(), 0, attention, *stream_);
    }
  }

  DecodeBatch batch() {
    DecodeBatch out;
    out.rows = 1;
    out.histories = &state_->history;
    out.selections = &state_->selection;
    return out;
  }

  std::vector<int> select(int head) {
    policy_->select_ahead(batch(), *stream_);
    const kernels::Selection& s = state_->selection;
    return {s.blocks + head * s.max_selected, s.blocks + head * s.max_selected + s.counts[head]};
  }

  Golden golden_ = read_golden();
  std::unique_ptr<Policy> policy_;
  std::unique_ptr<PolicyState> state_;
};

TEST_F(GoldenRun, ChoosesTheGoldenBlocks) {
  for (const PredictPer per : {PredictPer::kKvHead, PredictPer::kQueryHead}) {
    start(per);
    for (int step = 0; step < 20; ++step) {
      for (int m = 0; m < golden_.maps; ++m) {
        const auto best = golden_.best(step, m);
        EXPECT_EQ(select(m), std::vector<int>(best.begin(), best.end()))
            << "step " << step << " map " << m;
      }
      observe_step(step);
    }
    EXPECT_EQ(*state_->history.fallbacks, 0U);
  }
}

TEST_F(GoldenRun, MapsWithoutFiniteScoresChooseTheLatestBlocksAndAreCounted) {
  start(PredictPer::kKvHead);
  std::vector<float> block_max(static_cast<std::size_t>(golden_.maps * kGroup * golden_.columns),
                               -10.0F);
  block_max[20] = std::numeric_limits<float>::quiet_NaN();  // of the first KV head
  observe(block_max, golden_.columns, golden_.prefill_columns, 1);
  const auto chosen = select(0);
  ASSERT_EQ(chosen.size(), 56U);
  EXPECT_EQ(chosen.front(), golden_.prefill_columns - 4 - 56);
  EXPECT_EQ(chosen.back(), golden_.prefill_columns - 4 - 1);
  EXPECT_EQ(*state_->history.fallbacks, 1U);
  EXPECT_THAT(select(1), Not(testing::ElementsAreArray(chosen)));
}

TEST_F(GoldenRun, AShortContextIsChosenWhole) {
  policy_ = make(predictor_config(PredictPer::kKvHead), golden_.maps);
  state_ = policy_->admit(golden_.columns * kBlockTokens, *stream_);
  for (const int columns : {3, 8, 9, 20, 64}) {
    observe(std::vector<float>(static_cast<std::size_t>(golden_.maps * kGroup * golden_.columns),
                               -5.0F),
            golden_.columns, columns, 1);
    std::vector<int> expected;
    for (int block = 4; block < columns - 4; ++block) expected.push_back(block);
    EXPECT_EQ(select(golden_.maps - 1), expected) << columns;
  }
}

class WeightFiles : public PolicyTest {
 protected:
  void SetUp() override {
    std::ifstream in(published_weights(), std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
    ASSERT_FALSE(bytes_.empty()) << published_weights();
    // Tests run side by side, each in a process of its own.
    path_ = std::filesystem::path(testing::TempDir()) /
            (std::to_string(getpid()) + "-weights_test.safetensors");
  }
  void TearDown() override { std::filesystem::remove(path_); }

  Error error_of(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes;
    const auto weights = read_weights(path_);
    EXPECT_FALSE(weights);
    return weights ? Error{} : weights.error();
  }
  std::string with(const std::string& from, const std::string& to) const {
    std::string changed = bytes_;
    const auto at = changed.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return changed.replace(at, from.size(), to);
  }

  std::string bytes_;
  std::filesystem::path path_;
};

TEST_F(WeightFiles, ArePublishedOnes) {
  const auto weights = read_weights(published_weights()).value_or_throw();
  EXPECT_NE(weights.conv1_weight[0], 0.0F);
  EXPECT_NE(weights.conv3_bias, 0.0F);
}

TEST_F(WeightFiles, ErrorsNameFileAndTensor) {
  const auto missing = read_weights("/nonexistent/w.safetensors");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::kModelFile);
  EXPECT_THAT(missing.error().message, HasSubstr("/nonexistent/w.safetensors"));

  const Error truncated = error_of(bytes_.substr(0, bytes_.size() - 1));
  EXPECT_EQ(truncated.code, ErrorCode::kModelFile);
  EXPECT_THAT(truncated.message, HasSubstr("weights_test.safetensors"));

  const Error renamed = error_of(with("conv2.weight", "conv9.weight"));
  EXPECT_EQ(renamed.code, ErrorCode::kModelFile);
  EXPECT_THAT(renamed.message, HasSubstr("conv2.weight"));

  const Error shape = error_of(with("[16,1,3,3]", "[1,16,3,3]"));
  EXPECT_THAT(shape.message, HasSubstr("conv1.weight"));
  EXPECT_THAT(shape.message, HasSubstr("[16, 1, 3, 3]"));

  std::string not_finite = bytes_;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  not_finite.replace(not_finite.size() - sizeof nan, sizeof nan,
                     reinterpret_cast<const char*>(&nan), sizeof nan);
  EXPECT_THAT(error_of(not_finite).message, HasSubstr("not finite"));
}

TEST_F(WeightFiles, BadOnesStopAPolicyFromBeingMade) {
  PolicyShape shape;
  shape.kv.num_layers = shape.kv.num_kv_heads = shape.num_heads = 1;
  PolicyConfig config;
  config.kind = PolicyKind::kAttentionPredictor;
  config.weights = "/nonexistent/w.safetensors";
  const auto policy = make_policy(config, shape, *device_);
  ASSERT_FALSE(policy);
  EXPECT_EQ(policy.error().code, ErrorCode::kModelFile);
}

// Finite weights may still overflow: nothing is chosen out of range.
TEST_F(WeightFiles, HugeWeightsFallBack) {
  std::string huge = bytes_;
  const float most = std::numeric_limits<float>::max();
  const auto header =
      static_cast<unsigned char>(huge[0]) + 256 * static_cast<unsigned char>(huge[1]) + 8;
  for (std::size_t at = static_cast<std::size_t>(header); at + 4 <= huge.size(); at += 4) {
    huge.replace(at, sizeof most, reinterpret_cast<const char*>(&most), sizeof most);
  }
  std::ofstream(path_, std::ios::binary | std::ios::trunc) << huge;
  PolicyConfig config = predictor_config(PredictPer::kKvHead);
  config.weights = path_;
  const auto policy = make(config, 1);
  const auto state = policy->admit(2000, *stream_);
  constexpr int kColumns = 120;
  const std::vector<float> block_max(kGroup * kColumns, -4.0F);
  const std::vector<float> lse(kGroup, 0.0F);
  const std::int32_t columns = kColumns;
  AttentionRows rows;
  rows.block_max = block_max.data();
  rows.lse = lse.data();
  rows.pitch = kColumns;
  rows.num_columns = &columns;
  DecodeBatch batch;
  batch.rows = 1;
  batch.histories = &state->history;
  batch.selections = &state->selection;
  for (int step = 0; step < 70; ++step) {
    policy->observe_decode(batch, 0, rows, *stream_);
    policy->select_ahead(batch, *stream_);
    ASSERT_EQ(state->selection.counts[0], 56);
    ASSERT_GE(state->selection.blocks[0], 4);
    ASSERT_LT(state->selection.blocks[55], kColumns - 4);
  }
  EXPECT_EQ(*state->history.fallbacks, 70U);
}

}  // namespace
}  // namespace foretoken::predictor
