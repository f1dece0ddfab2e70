#include "coordinator/step_times.h"

#include <gtest/gtest.h>

namespace foretoken::coordinator {
namespace {

using Us = StepTimes::Microseconds;

TEST(StepTimes, TokensWithinIsTheInverseOfUnits) {
  const StepTimes times(1000);
  EXPECT_DOUBLE_EQ(times.units(0, 1000), 1500);
  EXPECT_DOUBLE_EQ(times.units(1000, 2000), 2500);
  for (const std::int64_t begin : {0, 1, 255, 100'000}) {
    for (const std::int64_t count : {1, 16, 256, 131'072}) {
      const double units = times.units(begin, begin + count);
      EXPECT_EQ(times.tokens_within(units, begin), count) << begin;
      EXPECT_EQ(times.tokens_within(units - 0.5, begin), count - 1) << begin;
    }
  }
  EXPECT_EQ(times.tokens_within(0, 500), 0);
}

TEST(StepTimes, KnowsNothingBeforeTheFirstPrefill) {
  StepTimes times(1000);
  EXPECT_EQ(times.units_beside_decodes(Us(1000)), 0);
  times.learn({.num_decodes = 1, .time = Us(100)});
  EXPECT_EQ(times.units_beside_decodes(Us(1000)), 0);
}

TEST(StepTimes, PrefillGetsWhatDecodingLeaves) {
  StepTimes times(1000);
  times.learn({.prefill_units = 100, .num_decodes = 0, .time = Us(200)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 500);
  times.learn({.num_decodes = 1, .time = Us(400)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 300);
  times.learn({.prefill_units = 100, .num_decodes = 1, .time = Us(700)});  // 3 us a unit
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 200);
}

TEST(StepTimes, FollowsASlowerStepAtOnceAndAFasterOneByAQuarter) {
  StepTimes times(1000);
  times.learn({.prefill_units = 1, .num_decodes = 0, .time = Us(1)});
  times.learn({.num_decodes = 1, .time = Us(100)});
  times.learn({.num_decodes = 1, .time = Us(500)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 500);
  times.learn({.num_decodes = 1, .time = Us(100)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 600);
}

TEST(StepTimes, PrefillGetsAShareWhereDecodingAloneTakesTheBound) {
  StepTimes times(1000);
  times.learn({.prefill_units = 1, .num_decodes = 0, .time = Us(1)});
  times.learn({.num_decodes = 1, .time = Us(2000)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 500);
}

TEST(StepTimes, WhatChangesTakeIsLeftToThemAndSaysNothingOfComputing) {
  StepTimes times(1000);
  times.learn({.prefill_units = 100, .num_decodes = 0, .time = Us(200)});
  times.learn({.num_decodes = 1, .time = Us(100)});
  times.learn({.prefill_units = 100, .num_decodes = 1, .has_changes = true, .time = Us(700)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 450);
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000), true), 250);
  times.learn({.prefill_units = 100, .num_decodes = 1, .has_changes = true, .time = Us(300)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000), true), 300);
  times.learn({.num_decodes = 0, .has_changes = true, .time = Us(5000)});  // a store that is busy
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000), true), 12.5);
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 450);
}

// However long a decode seems to take.
TEST(StepTimes, PrefillsShareOfALongDecodeIsNoMoreThanTheBound) {
  StepTimes times(1000);
  times.learn({.prefill_units = 1, .num_decodes = 0, .time = Us(1)});
  times.learn({.num_decodes = 1, .time = Us(500'000)});
  EXPECT_DOUBLE_EQ(times.units_beside_decodes(Us(1000)), 1000);
}

// The first step of a shape may be slow for once; with prefill in every later one, none shows the
// decoding alone.
TEST(StepTimes, OneSlowDecodeIsForgottenBesidePrefill) {
  StepTimes times(1000);
  times.learn({.prefill_units = 100, .num_decodes = 0, .time = Us(100)});
  times.learn({.num_decodes = 1, .time = Us(50'000)});
  for (int i = 0; i < 10; ++i) {
    const double units = times.units_beside_decodes(Us(1000));
    EXPECT_LE(units, 12'500);
    times.learn({.prefill_units = units, .num_decodes = 1, .time = Us(100 + units)});
  }
  EXPECT_NEAR(times.units_beside_decodes(Us(1000)), 900, 50);
}

}  // namespace
}  // namespace foretoken::coordinator
