#include "launch/internal/svg_plot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/result.h"

namespace foretoken::launch {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(SvgPlot, TicksAreRoundAndReachTheLargest) {
  EXPECT_THAT(axis_ticks(0), ElementsAre(0, 1));
  EXPECT_THAT(axis_ticks(100), ElementsAre(0, 20, 40, 60, 80, 100));
  EXPECT_THAT(axis_ticks(4.1), ElementsAre(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5));
  for (const double largest : {1e-6, 0.7, 1.0, 2.0, 5.0, 9.99, 131072.0}) {
    const auto ticks = axis_ticks(largest);
    EXPECT_GE(ticks.back(), largest * 0.999) << largest;
    EXPECT_TRUE(ticks.size() >= 4 && ticks.size() <= 11) << largest << ": " << ticks.size();
  }
}

TEST(SvgPlot, PlacesPointsBetweenTheAxes) {
  const std::string svg = to_svg({.title = "a < b & c",
                                  .x_label = "x",
                                  .y_label = "y",
                                  .series = {{"one", {{0, 0}, {100, 100}}}, {"none", {}}}});
  EXPECT_THAT(svg, HasSubstr("a &lt; b &amp; c"));
  EXPECT_THAT(svg, HasSubstr("points=\"80.0,440.0 720.0,40.0 \""));
  EXPECT_THAT(svg, HasSubstr(">one</text>"));
  EXPECT_THAT(svg, HasSubstr(">none</text>"));
}

TEST(SvgPlot, AFileThatCantBeWrittenIsAnError) {
  EXPECT_THROW(save_svg({}, "/nowhere/plot.svg"), Exception);
}

}  // namespace
}  // namespace foretoken::launch
