#include "common/half.h"

#include <gtest/gtest.h>

#include <limits>

namespace foretoken {
namespace {

// The value by the format's definition.
float value_of(int half) {
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

TEST(Half, EveryFiniteOneComesBack) {
  for (int half = 0; half < 0x10000; ++half) {
    if ((half & 0x7C00) == 0x7C00) continue;
    const float value = float_from_half(static_cast<std::uint16_t>(half));
    ASSERT_EQ(value, value_of(half)) << half;
    ASSERT_EQ(half_from_float(value), half);
  }
}

TEST(Half, InfinitiesAndNansStayWhatTheyAre) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(float_from_half(0x7C00), kInfinity);
  EXPECT_EQ(float_from_half(0xFC00), -kInfinity);
  EXPECT_EQ(half_from_float(kInfinity), 0x7C00);
  EXPECT_EQ(half_from_float(-1e6F), 0xFC00);
  EXPECT_TRUE(std::isnan(float_from_half(0x7C01)));
  EXPECT_TRUE(std::isnan(float_from_half(half_from_float(std::nanf("")))));
}

// Between two neighbours the nearer one is taken, and of two as near the even one.
TEST(Half, RoundsToNearestEven) {
  for (int half = 0; half < 0x7BFF; ++half) {
    const float low = value_of(half);
    const float high = value_of(half + 1);
    const float middle = low + (high - low) / 2;  // exact in float
    ASSERT_EQ(half_from_float(middle), half % 2 == 0 ? half : half + 1) << half;
    ASSERT_EQ(half_from_float(std::nextafter(middle, 0.0F)), half);
    ASSERT_EQ(half_from_float(std::nextafter(middle, high)), half + 1);
  }
  EXPECT_EQ(half_from_float(65519.996F), 0x7BFF);
  EXPECT_EQ(half_from_float(65520.0F), 0x7C00);
}

}  // namespace
}  // namespace foretoken
