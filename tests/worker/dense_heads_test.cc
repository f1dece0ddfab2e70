#include "worker/dense_heads.h"

#include <gtest/gtest.h>

namespace foretoken::worker {
namespace {

using Heads = std::vector<std::pair<int, int>>;

Heads choose(const std::vector<std::vector<float>>& recalls, float least, int most) {
  const std::vector<std::span<const float>> rows(recalls.begin(), recalls.end());
  Heads heads;
  for (const DenseHead& head : choose_dense_heads(rows, least, most)) {
    heads.emplace_back(head.row, head.index);
  }
  return heads;
}

TEST(DenseHeads, AreThoseBelowTheBoundTheLowestFirst) {
  EXPECT_EQ(choose({{0.9F, 0.5F, 1.0F}, {0.7F, 0.8F, 0.3F}}, 0.8F, 8),
            (Heads{{1, 2}, {0, 1}, {1, 0}}));
}

TEST(DenseHeads, AreCappedOverTheWholeBatch) {
  EXPECT_EQ(choose({{0.9F, 0.5F, 1.0F}, {0.7F, 0.8F, 0.3F}}, 0.8F, 2), (Heads{{1, 2}, {0, 1}}));
  EXPECT_EQ(choose({{0.1F}}, 0.8F, 0), Heads{});
}

TEST(DenseHeads, AreNoneWhereAllKeepEnough) {
  EXPECT_EQ(choose({}, 0.8F, 8), Heads{});
  EXPECT_EQ(choose({{0.8F, 1.0F}, {}}, 0.8F, 8), Heads{});
}

}  // namespace
}  // namespace foretoken::worker
