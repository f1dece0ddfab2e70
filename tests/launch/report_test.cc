#include "launch/internal/report.h"

#include <gtest/gtest.h>

namespace foretoken::launch {
namespace {

TEST(Report, HasTheFieldsOfTheContract) {
  DoneMessage done;
  done.prompt_ids = {1, 2};
  done.tokens = {{.id = 5, .logprob = -0.5F, .top = {{.id = 5, .logprob = -0.5F}}}};
  done.text = "five";
  done.finish_reason = "length";
  const auto json = to_json(done, /*with_logprobs=*/true);
  for (const char* key : {"prompt_ids", "token_ids", "text", "finish_reason", "logprobs", "usage",
                          "kv", "timing_ms"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["token_ids"].dump(), "[5]");
  EXPECT_EQ(json["logprobs"][0]["token"], 5);
  EXPECT_EQ(json["logprobs"][0]["top"].dump(), "[[5,-0.5]]");
}

TEST(Report, RecallIsAMeanAndNullWithoutAudit) {
  KvReport kv;
  EXPECT_TRUE(to_json(kv)["recall"].is_null());
  EXPECT_TRUE(to_json(kv)["kl"].is_null());
  kv.recall_sum = 1.5;
  kv.recall_count = 2;
  EXPECT_EQ(to_json(kv)["recall"], 0.75);
}

TEST(Report, CountsThePredictorsFallbacks) {
  KvReport kv;
  kv.predictor_fallbacks = 3;
  EXPECT_EQ(to_json(kv)["predictor_fallbacks"], 3);
}

}  // namespace
}  // namespace foretoken::launch
