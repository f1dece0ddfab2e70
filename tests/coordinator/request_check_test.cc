#include "coordinator/request_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace foretoken::coordinator {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kVocab = 100;

GenerateRequest valid() {
  GenerateRequest request;
  request.request_id = "r1";
  request.prompt = "hello";
  return request;
}

template <typename Change>
std::string why(Change change) {
  auto request = valid();
  change(request);
  const auto status = check_request(request, kVocab);
  if (status) return "accepted";
  EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
  return status.error().message;
}

TEST(RequestCheck, TakesWhatIsInRange) {
  EXPECT_EQ(why([](auto&) {}), "accepted");
  EXPECT_EQ(why([](auto& r) {
              r.prompt.reset();
              r.prompt_ids = {{0, 99}};
              r.max_tokens = 1;
              r.sampling.temperature = 0;
              r.sampling.num_logprobs = 20;
              r.stop.assign(kMaxStopStrings, std::string(kMaxStopBytes, 'x'));
              r.stop_token_ids = {0, 99};
            }),
            "accepted");
}

TEST(RequestCheck, NamesTheFieldAndItsCap) {
  const auto nan = std::nanf("");
  EXPECT_THAT(why([](auto& r) { r.request_id = ""; }), HasSubstr("request_id must be 1 to 128"));
  EXPECT_THAT(why([](auto& r) { r.request_id = "a b"; }), HasSubstr("request_id"));
  EXPECT_THAT(why([](auto& r) { r.request_id = "\xc3\xa9"; }), HasSubstr("request_id"));
  EXPECT_THAT(why([](auto& r) { r.request_id = std::string(129, 'x'); }), HasSubstr("request_id"));
  EXPECT_THAT(why([](auto& r) { r.prompt = ""; }), HasSubstr("prompt is empty"));
  EXPECT_THAT(why([](auto& r) { r.prompt.reset(); }), HasSubstr("one of prompt and prompt_ids"));
  EXPECT_THAT(why([](auto& r) { r.prompt_ids = {{1}}; }),
              HasSubstr("one of prompt and prompt_ids"));
  EXPECT_THAT(why([](auto& r) { r.max_tokens = 0; }), HasSubstr("max_tokens must be at least 1"));
  EXPECT_THAT(why([](auto& r) { r.stop_token_ids = {100}; }), HasSubstr("the id 100"));
  EXPECT_THAT(why([](auto& r) { r.forced_ids = {-1}; }), HasSubstr("the id -1"));
  EXPECT_THAT(why([](auto& r) { r.forced_ids.assign(257, 1); }), HasSubstr("asks for 256 tokens"));
  EXPECT_THAT(why([](auto& r) {
                r.forced_ids = {1, 2};
                r.max_tokens = 1;
              }),
              HasSubstr("forced_ids has 2 ids; max_tokens asks for 1"));
  EXPECT_THAT(why([](auto& r) { r.stop.assign(17, "x"); }), HasSubstr("at most 16"));
  EXPECT_THAT(why([](auto& r) { r.stop = {std::string(257, 'x')}; }), HasSubstr("at most 256"));
  EXPECT_THAT(why([](auto& r) { r.stop = {""}; }), HasSubstr("empty string"));
  EXPECT_THAT(why([](auto& r) { r.stop_token_ids.assign(257, 1); }), HasSubstr("at most 256"));
  EXPECT_THAT(why([](auto& r) { r.sampling.num_logprobs = 21; }),
              HasSubstr("num_logprobs must be in [0, 20], not 21"));
  EXPECT_THAT(why([](auto& r) { r.sampling.temperature = -1; }), HasSubstr("temperature"));
  EXPECT_THAT(why([=](auto& r) { r.sampling.temperature = nan; }), HasSubstr("temperature"));
  EXPECT_THAT(why([](auto& r) { r.sampling.top_p = 0; }), HasSubstr("top_p"));
  EXPECT_THAT(why([](auto& r) { r.sampling.top_p = 1.01F; }), HasSubstr("top_p"));
  EXPECT_THAT(why([](auto& r) { r.sampling.top_k = -1; }), HasSubstr("top_k"));
  EXPECT_THAT(why([](auto& r) { r.sampling.min_p = 2; }), HasSubstr("min_p"));
  EXPECT_THAT(why([](auto& r) { r.sampling.repetition_penalty = 0; }),
              HasSubstr("repetition_penalty"));
  EXPECT_THAT(why([=](auto& r) { r.sampling.presence_penalty = nan; }),
              HasSubstr("presence_penalty"));
  EXPECT_THAT(why([](auto& r) { r.sampling.frequency_penalty = 3; }),
              HasSubstr("frequency_penalty"));
}

TEST(RequestCheck, PromptAndOutputMustFitTheContext) {
  EXPECT_EQ(*check_length(90, 10, 100), 10);
  EXPECT_EQ(*check_length(10, std::nullopt, 1000), kDefaultMaxTokens);
  EXPECT_EQ(*check_length(990, std::nullopt, 1000), 10);
  const auto message = [](auto result) {
    return result ? std::string("accepted") : result.error().message;
  };
  EXPECT_THAT(message(check_length(91, 10, 100)), HasSubstr("ask for at most 9"));
  EXPECT_THAT(message(check_length(100, std::nullopt, 100)), HasSubstr("--max-model-len"));
  EXPECT_THAT(message(check_length(0, 10, 100)), HasSubstr("prompt is empty"));
}

}  // namespace
}  // namespace foretoken::coordinator
