#include "worker/internal/heart.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace foretoken::worker {
namespace {

// What ends the rank, within ten seconds.
Error end_of(const Heart& heart) {
  for (int i = 0; i < 1000; ++i) {
    try {
      heart.check();
    } catch (const Exception& failure) {
      return failure.error();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return {ErrorCode::kTimeout, "it lives on"};
}

TEST(Heart, ThatFailsEndsItsRank) {
  RankConfig config;
  config.coordinator = "ipc:///nowhere";
  config.key_file = "/no/such/keys";
  const Error error = end_of(Heart(config, Epoch{1}, 0));
  EXPECT_EQ(error.code, ErrorCode::kUnavailable) << error.message;
  EXPECT_THAT(error.message, testing::HasSubstr("/no/such/keys"));
}

TEST(Heart, WithoutAnAnswerEndsItsRank) {
  RankConfig config;
  config.coordinator = "tcp://127.0.0.1:9";
  config.coordinator_timeout = std::chrono::seconds(1);
  const Error error = end_of(Heart(config, Epoch{1}, 0));
  EXPECT_EQ(error.code, ErrorCode::kUnavailable) << error.message;
  EXPECT_THAT(error.message, testing::HasSubstr("was silent for 1 s"));
}

}  // namespace
}  // namespace foretoken::worker
