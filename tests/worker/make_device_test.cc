#include "worker/internal/make_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/small_model.h"

namespace foretoken::worker {
namespace {

using testing::AllOf;
using testing::HasSubstr;

ServiceConfig predicted(int max_num_seqs) {
  ServiceConfig config;
  config.kv_policy = "attention-predictor";
  config.max_num_seqs = max_num_seqs;
  return config;
}

std::string why(const ServiceConfig& config, const ModelConfig& model,
                ErrorCode code = ErrorCode::kConfig) {
  const Status status = check_gpu_limits(config, model);
  if (status) return "";
  EXPECT_EQ(status.error().code, code);
  return status.error().message;
}

// All of these end a rank in mid-service where they are not refused.
TEST(GpuLimits, SequencesThatArePredictedInAStep) {
  EXPECT_EQ(why(predicted(1024), small_model()), "");
  EXPECT_THAT(why(predicted(1025), small_model()),
              AllOf(HasSubstr("1024"), HasSubstr("--max-num-seqs, now 1025")));
  ServiceConfig config = predicted(4096);
  config.kv_policy = "auto";
  EXPECT_THAT(why(config, small_model()), HasSubstr("--max-num-seqs"));
  config.kv_policy = "full";
  EXPECT_EQ(why(config, small_model()), "");
}

TEST(GpuLimits, TokensOfASequence) {
  ModelConfig model = small_model();
  model.max_position = 1 << 20;
  EXPECT_EQ(why(predicted(8), model), "");
  ++model.max_position;
  EXPECT_THAT(why(predicted(8), model), HasSubstr("--max-model-len, now 1048577"));
  ServiceConfig config = predicted(8);
  config.max_model_len = 131'072;
  EXPECT_EQ(why(config, model), "");
}

TEST(GpuLimits, RowsThatHoldValues) {
  ModelConfig model = small_model();
  model.num_layers = 80;
  ServiceConfig config = predicted(1024);
  EXPECT_EQ(why(config, model), "");
  config.history_fill = "hold";
  EXPECT_THAT(why(config, model), AllOf(HasSubstr("at most 819"), HasSubstr("--max-num-seqs")));
  config.max_num_seqs = 819;
  EXPECT_EQ(why(config, model), "");
}

TEST(GpuLimits, HeadsOfAModel) {
  ModelConfig model = small_model();
  model.head_dim = 96;
  EXPECT_THAT(why(predicted(8), model, ErrorCode::kDevice), HasSubstr("head_dim 96"));
}

TEST(GpuLimits, VocabularyOfAModel) {
  ModelConfig model = small_model();
  model.vocab_size = (1 << 19) - 1;
  EXPECT_EQ(why(predicted(8), model), "");
  ++model.vocab_size;
  EXPECT_THAT(why(predicted(8), model, ErrorCode::kDevice),
              AllOf(HasSubstr("vocab_size 524288"), HasSubstr("cpu")));
}

// A KV head that ranks share has as many on each as are its share.
TEST(GpuLimits, QueryHeadsOfAKvHead) {
  ModelConfig model = small_model();
  model.num_heads = 2 * 64;
  ServiceConfig config = predicted(8);
  for (const int ranks : {1, 2, 3}) {
    config.tensor_parallel_size = ranks;
    EXPECT_THAT(why(config, model, ErrorCode::kDevice),
                AllOf(HasSubstr("64 query heads"), HasSubstr("--tensor-parallel-size")));
  }
  config.tensor_parallel_size = 4;
  EXPECT_EQ(why(config, model), "");
  model.num_heads = 2 * 32;
  config.tensor_parallel_size = 1;
  EXPECT_EQ(why(config, model), "");
}

}  // namespace
}  // namespace foretoken::worker
