#include "worker/internal/gpu_choice.h"

#include <gtest/gtest.h>

namespace foretoken::worker {
namespace {

TEST(ChooseGpu, GivesEachRankOfANodeItsOwn) {
  EXPECT_EQ(*choose_gpu({.group = 0, .rank_on_node = 0, .ranks_on_node = 2, .num_devices = 2}), 0);
  EXPECT_EQ(*choose_gpu({.group = 0, .rank_on_node = 1, .ranks_on_node = 2, .num_devices = 2}), 1);
  EXPECT_EQ(*choose_gpu({.group = 1, .rank_on_node = 1, .ranks_on_node = 2, .num_devices = 4}), 3);
}

TEST(ChooseGpu, AGroupOfAnotherNodeBeginsAnew) {
  EXPECT_EQ(*choose_gpu({.group = 3, .rank_on_node = 5, .ranks_on_node = 8, .num_devices = 8}), 5);
}

TEST(ChooseGpu, MoreRanksThanGpusAreAnErrorThatNamesBoth) {
  const auto chosen =
      choose_gpu({.group = 0, .rank_on_node = 0, .ranks_on_node = 4, .num_devices = 2});
  ASSERT_FALSE(chosen);
  EXPECT_EQ(chosen.error().code, ErrorCode::kDevice);
  EXPECT_NE(chosen.error().message.find("4 ranks"), std::string::npos);
  EXPECT_NE(chosen.error().message.find("2 GPUs"), std::string::npos);
}

TEST(ChooseGpu, OneVisibleGpuIsTakenAndComparedWithTheOthers) {
  EXPECT_EQ(*choose_gpu({.group = 0, .rank_on_node = 3, .ranks_on_node = 4, .num_devices = 1}), 0);
  EXPECT_TRUE(check_own_gpu({"a", "b", "c", "d"}, 3));
  EXPECT_TRUE(check_own_gpu({"a"}, 0));
  const auto shared = check_own_gpu({"a", "b", "a"}, 2);
  ASSERT_FALSE(shared);
  EXPECT_EQ(shared.error().code, ErrorCode::kDevice);
  EXPECT_NE(shared.error().message.find("ranks 2 and 0"), std::string::npos);
}

}  // namespace
}  // namespace foretoken::worker
