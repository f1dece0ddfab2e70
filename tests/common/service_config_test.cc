#include "common/service_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

namespace foretoken {
namespace {

using ::testing::HasSubstr;

ServiceConfig valid() {
  ServiceConfig config;
  config.model = "/models/m";
  return config;
}

template <typename T>
std::string why(T ServiceConfig::*field, T value) {
  auto config = valid();
  config.*field = value;
  const auto status = validate(config);
  return status ? "accepted" : status.error().message;
}

TEST(ServiceConfig, DefaultsAreValidOnceAModelIsNamed) {
  EXPECT_TRUE(validate(valid()));
  const auto status = validate(ServiceConfig{});
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, ErrorCode::kConfig);
  EXPECT_THAT(status.error().message, HasSubstr("--model"));
}

TEST(ServiceConfig, NamesTheFlagAndWhatItTakes) {
  using C = ServiceConfig;
  EXPECT_THAT(why<std::string>(&C::kv_policy, "attention-predicter"),
              HasSubstr("did you mean attention-predictor?"));
  EXPECT_THAT(why<std::string>(&C::kv_resident, "always"),
              HasSubstr("--kv-resident takes auto | never"));
  EXPECT_THAT(why<std::string>(&C::device, "tpu"), HasSubstr("--device takes auto | cuda | cpu"));
  EXPECT_THAT(why(&C::kv_budget, 127), HasSubstr("--kv-budget"));
  EXPECT_THAT(why(&C::kv_budget, 128), HasSubstr("at least 144"));
  EXPECT_THAT(why(&C::kv_budget, 1000), HasSubstr("multiple of 16"));
  EXPECT_EQ(why(&C::kv_budget, 144), "accepted");
  EXPECT_THAT(why(&C::tensor_parallel_size, 0), HasSubstr("--tensor-parallel-size must be in"));
  EXPECT_THAT(why(&C::port, 65536), HasSubstr("--port"));
  EXPECT_THAT(why(&C::max_model_len, std::int64_t{-1}), HasSubstr("--max-model-len"));
  EXPECT_THAT(why(&C::max_model_len, std::int64_t{1'280'001}), HasSubstr("[0, 1280000]"));
  EXPECT_EQ(why(&C::max_model_len, std::int64_t{1'280'000}), "accepted");
  EXPECT_THAT(why(&C::gpu_memory_utilization, 1.5), HasSubstr("--gpu-memory-utilization"));
  EXPECT_THAT(why(&C::gpu_memory_utilization, std::numeric_limits<double>::quiet_NaN()),
              HasSubstr("--gpu-memory-utilization"));
}

TEST(ServiceConfig, ATraceNamesItsChurn) {
  EXPECT_EQ(trace_churn("churn=8"), 0.08F);
  EXPECT_EQ(trace_churn("churn=0"), 0.0F);
  EXPECT_EQ(trace_churn("churn=100"), 1.0F);
  for (const char* wrong : {"", "8", "churn=", "churn=101", "churn=-1", "churn=8%", "churn=nan"}) {
    EXPECT_EQ(trace_churn(wrong), std::nullopt) << wrong;
  }
  EXPECT_EQ(why<std::string>(&ServiceConfig::trace, "churn=2.5"), "accepted");
  EXPECT_THAT(why<std::string>(&ServiceConfig::trace, "8"), HasSubstr("--trace takes churn=P"));
  auto config = valid();
  config.kv_policy = "full";
  config.trace = "churn=8";
  ASSERT_FALSE(validate(config));
}

TEST(ServiceConfig, PrefillTokensOfAStepSuitTheDeviceUnlessTheyAreGiven) {
  auto config = valid();
  EXPECT_EQ(batched_tokens(config, DeviceKind::kCpu), 512);
  EXPECT_EQ(batched_tokens(config, DeviceKind::kGpu), 8192);
  config.max_batched_tokens = 2048;
  EXPECT_TRUE(validate(config));
  EXPECT_EQ(batched_tokens(config, DeviceKind::kCpu), 2048);
  EXPECT_EQ(batched_tokens(config, DeviceKind::kGpu), 2048);
  EXPECT_THAT(why(&ServiceConfig::max_batched_tokens, -1), HasSubstr("--max-batched-tokens"));
}

TEST(ServiceConfig, TheNvmeTierNeedsItsFolder) {
  auto config = valid();
  config.kv_persist = true;
  EXPECT_THAT(validate(config).error().message, HasSubstr("--kv-persist needs --kv-nvme-path"));
  config.kv_persist = false;
  config.kv_nvme_gib = 1;
  EXPECT_THAT(validate(config).error().message, HasSubstr("--kv-nvme-gib needs --kv-nvme-path"));
  config.kv_nvme_gib = 0;
  config.kv_nvme_reuse = "always";
  EXPECT_THAT(validate(config).error().message, HasSubstr("--kv-nvme-reuse needs --kv-nvme-path"));
  config.kv_nvme_path = "kv";
  EXPECT_TRUE(validate(config));
}

TEST(ServiceConfig, WhatIsKeptEncryptedNeedsItsKey) {
  auto config = valid();
  config.kv_encrypt = true;
  EXPECT_THAT(validate(config).error().message, HasSubstr("--kv-encrypt needs --kv-nvme-path"));
  config.kv_nvme_path = "kv";
  EXPECT_TRUE(validate(config));
  config.kv_persist = true;
  EXPECT_THAT(validate(config).error().message, HasSubstr("needs --kv-key-file"));
  config.kv_key_file = "key";
  EXPECT_TRUE(validate(config));
  config.kv_encrypt = false;
  EXPECT_THAT(validate(config).error().message, HasSubstr("--kv-key-file needs --kv-encrypt"));
}

TEST(ServiceConfig, ABoundOnRecallNeedsAudits) {
  auto config = valid();
  config.min_recall = 0.8;
  EXPECT_THAT(validate(config).error().message, HasSubstr("--min-recall needs --audit-every"));
  config.audit_every = 16;
  EXPECT_TRUE(validate(config));
  config.min_recall = 1;
  EXPECT_THAT(validate(config).error().message, HasSubstr("--min-recall must be in [0"));
}

TEST(ServiceConfig, ComesBackFromJson) {
  auto config = valid();
  config.kv_policy = "oracle";
  config.kv_host_gib = 1.5;
  config.max_model_len = std::int64_t{1} << 20;
  config.guard_arena = true;
  config.port = 0;
  const auto back = service_config_from_json(to_json(config));
  ASSERT_TRUE(back) << back.error().message;
  EXPECT_EQ(*back, config);
  EXPECT_EQ(*service_config_from_json("{}"), ServiceConfig{});
}

TEST(ServiceConfig, RefusesJsonThatIsNotIt) {
  const auto error = [](std::string_view json) {
    const auto result = service_config_from_json(json);
    return result ? std::string("accepted") : result.error().message;
  };
  EXPECT_THAT(error(R"({"kv_bugdet": 1024})"), HasSubstr("did you mean kv_budget?"));
  EXPECT_THAT(error(R"({"zzz": 1})"), HasSubstr("unknown setting \"zzz\""));
  EXPECT_THAT(error(R"({"port": "8000"})"), HasSubstr("--port must be an integer"));
  EXPECT_THAT(error(R"({"port": 1.5})"), HasSubstr("--port must be an integer"));
  EXPECT_THAT(error(R"({"port": 99999999999})"), HasSubstr("--port must be an integer"));
  EXPECT_THAT(error(R"({"model": 3})"), HasSubstr("--model must be a string"));
  EXPECT_THAT(error(R"({"guard_arena": 1})"), HasSubstr("--guard-arena must be true or false"));
  EXPECT_THAT(error("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error("{"), HasSubstr("not a JSON object"));
  EXPECT_EQ(error(R"({"kv_host_gib": 2})"), "accepted");
}

TEST(NearestName, FindsTyposAndNothingElse) {
  const std::vector<std::string> known = {"max-tokens", "temperature", "seed"};
  EXPECT_EQ(nearest_name("max-token", known), "max-tokens");
  EXPECT_EQ(nearest_name("temprature", known), "temperature");
  EXPECT_EQ(nearest_name("sede", known), "seed");
  EXPECT_EQ(nearest_name("quantization", known), "");
  EXPECT_EQ(nearest_name("", known), "");
  EXPECT_EQ(nearest_name("x", {}), "");
}

}  // namespace
}  // namespace foretoken
