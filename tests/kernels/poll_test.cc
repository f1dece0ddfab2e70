#include "kernels/poll.h"

#include <gtest/gtest.h>

namespace foretoken::kernels {
namespace {

using namespace std::chrono_literals;

constexpr PollLimits kLimits{.busy = 1ms, .pause = 100us, .deadline = 350ms};
void nothing() {}

TEST(PollUntil, AsksOnceForWhatHasHappened) {
  int asked = 0;
  EXPECT_TRUE(poll_until([&] { return ++asked == 1; }, kLimits, nothing));
  EXPECT_EQ(asked, 1);
}

TEST(PollUntil, WaitsThroughBothPhases) {
  const auto due = std::chrono::steady_clock::now() + 5ms;
  EXPECT_TRUE(
      poll_until([&] { return std::chrono::steady_clock::now() >= due; }, kLimits, nothing));
}

TEST(PollUntil, GivesUpAtTheDeadline) {
  int looks_elsewhere = 0;
  EXPECT_FALSE(poll_until([] { return false; }, kLimits, [&] { ++looks_elsewhere; }));
  EXPECT_GE(looks_elsewhere, 1);
  EXPECT_LE(looks_elsewhere, 3);
}

TEST(PollUntil, WhatIsThrownMeanwhileEndsTheWait) {
  EXPECT_THROW(poll_until([] { return false; }, kLimits, [] { throw 1; }), int);
}

}  // namespace
}  // namespace foretoken::kernels
