#include "launch/internal/supervisor.h"

#include <gtest/gtest.h>

namespace foretoken::launch {
namespace {

using namespace std::chrono_literals;

TEST(RestartLimit, PausesGrowAndThenItIsOver) {
  RestartLimit limit;
  const RestartLimit::Clock::time_point start{};
  EXPECT_EQ(limit.next(start), 0ms);
  auto last = 0ms;
  for (int i = 1; i < 5; ++i) {
    const auto pause = limit.next(start + std::chrono::seconds(i));
    ASSERT_TRUE(pause);
    EXPECT_GT(*pause, last);
    last = *pause;
  }
  EXPECT_FALSE(limit.next(start + 6s));
}

TEST(RestartLimit, OldDeathsAreForgotten) {
  RestartLimit limit;
  RestartLimit::Clock::time_point now{};
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(limit.next(now));
    now += 3min;
  }
}

}  // namespace
}  // namespace foretoken::launch
