#include "worker/load_progress.h"

#include <gtest/gtest.h>

namespace foretoken::worker {
namespace {

using std::chrono::seconds;

TEST(LoadProgress, DescribesHowFarItIs) {
  EXPECT_EQ(describe_progress(0, 16'000'000'000, seconds(0)), "0 %, 0.0 of 16.0 GB");
  EXPECT_EQ(describe_progress(4'000'000'000, 16'000'000'000, seconds(2)),
            "25 %, 4.0 of 16.0 GB, 2.00 GB/s, 6 s left");
  EXPECT_EQ(describe_progress(16'000'000'000, 16'000'000'000, seconds(8)),
            "100 %, 16.0 of 16.0 GB, 2.00 GB/s, 0 s left");
}

TEST(LoadProgress, SaysHowFastItWasAndFromWhere) {
  EXPECT_EQ(describe_load(16'060'000'000, std::chrono::milliseconds(410), "the store"),
            "16.06 GB in 0.41 s (39.2 GB/s) from the store");
}

TEST(LoadProgress, DrawsABarOfOneLength) {
  EXPECT_EQ(progress_bar(0, 100), "[....................]");
  EXPECT_EQ(progress_bar(34, 100), "[######..............]");
  EXPECT_EQ(progress_bar(100, 100), "[####################]");
}

}  // namespace
}  // namespace foretoken::worker
