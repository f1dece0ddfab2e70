// The choice of blocks on the CPU: from scores, from exact maxima, and the latest ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/cpu/best_blocks.h"
#include "kernels/device.h"
#include "tests/predictor/reference.h"

namespace foretoken::kernels {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class Chosen {
 public:
  Chosen(int heads, int max_selected)
      : blocks_(static_cast<std::size_t>(heads * max_selected), -7),
        counts_(static_cast<std::size_t>(heads), -7) {
    selection_ = {blocks_.data(), counts_.data(), max_selected};
  }
  const Selection& selection() const { return selection_; }
  Selection* selection_address() { return &selection_; }
  std::vector<int> of(int head) const {
    const auto first = blocks_.begin() + head * selection_.max_selected;
    return {first, first + counts_[static_cast<std::size_t>(head)]};
  }

 private:
  std::vector<std::int32_t> blocks_;
  std::vector<std::int32_t> counts_;
  Selection selection_{};
};

TEST(HeadChoice, TiesGoToTheLowerColumn) {
  Chosen chosen(1, 8);
  HeadChoice choice;
  choice.start(6);
  EXPECT_TRUE(choice.add_best(std::vector<float>{1, 2, 2, 2, -0.0F, 0.0F}, 2));
  choice.finish(0, 1, 0, 8, chosen.selection());
  EXPECT_THAT(chosen.of(0), ElementsAre(4 + 1, 4 + 2));
}

TEST(HeadChoice, NegativeScoresOrderToo) {
  Chosen chosen(1, 8);
  HeadChoice choice;
  choice.start(4);
  EXPECT_TRUE(choice.add_best(std::vector<float>{-3, -1, -2, -4}, 2));
  choice.finish(0, 1, 0, 8, chosen.selection());
  EXPECT_THAT(chosen.of(0), ElementsAre(5, 6));
}

TEST(HeadChoice, UnitesMapsAndKeepsTheBestScoresWhereTheUnionIsTooLarge) {
  Chosen chosen(2, 3);
  HeadChoice choice;
  choice.start(5);
  EXPECT_TRUE(choice.add_best(std::vector<float>{5, 4, 0, 0, 0}, 2));
  EXPECT_TRUE(choice.add_best(std::vector<float>{0, 0, 0, 3, 9}, 2));
  choice.finish(1, 1, 0, 3, chosen.selection());
  EXPECT_THAT(chosen.of(1), ElementsAre(4, 5, 8));  // 5, 4 and 9; not 3
}

// Of each segment, the best block that was not chosen, over the worst that was, of any map.
TEST(HeadChoice, NotesHowNearSegmentsAreToBeingWanted) {
  Chosen chosen(1, 8);
  HeadChoice choice;
  std::vector<float> scores(30, 0.0F);
  scores[0] = 8;   // block 4
  scores[1] = 4;   // 5
  scores[11] = 2;  // 15, of segment 0
  scores[12] = 3;  // 16, of segment 1
  scores[29] = -1;
  choice.start(30);
  EXPECT_TRUE(choice.add_best(scores, 2));
  choice.finish(0, 1, 0, 8, chosen.selection());
  std::vector<float> segments(4, 0.0F);
  choice.note_segments(scores, segments);
  EXPECT_THAT(segments, ElementsAre(0.5F, 0.75F, 0.0F, 0.0F));
  choice.note_segments(std::vector<float>(30, -1.0F), segments);  // scores that say nothing
  EXPECT_THAT(segments, ElementsAre(0.5F, 0.75F, 0.0F, 0.0F));
}

TEST(HeadChoice, FewerCandidatesThanKAreAllChosen) {
  Chosen chosen(1, 8);
  HeadChoice choice;
  choice.start(2);
  EXPECT_TRUE(choice.add_best(std::vector<float>{1, 2}, 8));
  choice.finish(0, 1, 0, 8, chosen.selection());
  EXPECT_THAT(chosen.of(0), ElementsAre(4, 5));
  choice.start(0);
  EXPECT_TRUE(choice.add_best({}, 8));
  choice.finish(0, 1, 0, 8, chosen.selection());
  EXPECT_THAT(chosen.of(0), IsEmpty());
}

TEST(HeadChoice, ScoresThatAreNotFiniteChooseNothing) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Chosen chosen(1, 3);
    HeadChoice choice;
    choice.start(6);
    EXPECT_FALSE(choice.add_best(std::vector<float>{1, bad, 0, 0, 0, 0}, 2));
    choice.add_latest(2);
    EXPECT_TRUE(choice.add_best(std::vector<float>{3, 2, 1, 0, 0, 0}, 2));
    choice.finish(0, 1, 0, 3, chosen.selection());
    // Scored blocks come first where the union is too large; of the latest, the lower.
    EXPECT_THAT(chosen.of(0), ElementsAre(4, 5, 8));
  }
}

TEST(HeadChoice, EqualsASortOverRandomScores) {
  std::mt19937 random(7);
  std::uniform_int_distribution<int> few(0, 9);  // many ties
  HeadChoice choice;
  for (const int count : {1, 2, 55, 56, 57, 200, 477}) {
    std::vector<float> scores(static_cast<std::size_t>(count));
    for (float& score : scores) score = static_cast<float>(few(random));
    Chosen chosen(1, 56);
    choice.start(count);
    EXPECT_TRUE(choice.add_best(scores, 56));
    choice.finish(0, 1, 0, 56, chosen.selection());
    auto expected = predictor::reference::top(std::span<const float>(scores), 56);
    for (int& block : expected) block += kSinkBlocks;
    EXPECT_EQ(chosen.of(0), expected);
  }
}

TEST(LocalWindow, HoldsEveryBlockThatTouchesTheLast64Tokens) {
  EXPECT_EQ(first_local_block(0), 0);
  EXPECT_EQ(first_local_block(63), 0);
  EXPECT_EQ(first_local_block(64), 0);   // tokens 1 .. 64
  EXPECT_EQ(first_local_block(78), 0);   // 15 .. 78
  EXPECT_EQ(first_local_block(79), 1);   // 16 .. 79
  EXPECT_EQ(first_local_block(159), 6);  // 96 .. 159
}

// Ops on one sequence of 2 layers and 2 KV heads, at `length` tokens.
class SelectOps : public testing::Test {
 protected:
  void use(int length) {
    length_ = length;
    kv_.length = &length_;
    kv_.shape.num_layers = 2;
    kv_.shape.num_kv_heads = 2;
  }
  std::unique_ptr<Device> device_ = make_cpu_device({2, 0});
  std::unique_ptr<Stream> stream_ = device_->make_stream(StreamKind::kCompute);
  std::int32_t length_ = 0;
  SequenceKv kv_{};
};

TEST_F(SelectOps, RecentAreTheBlocksBeforeTheLocalWindow) {
  for (const auto& [length, expected] : std::vector<std::pair<int, std::vector<int>>>{
           {0, {}}, {100, {}}, {142, {}}, {143, {4}}, {200, {5, 6, 7}}, {1000, {55, 56, 57}}}) {
    use(length);
    Chosen chosen(4, 5);
    SelectRecentArgs args{};
    args.sequences = &kv_;
    args.selections = chosen.selection_address();
    args.rows = 1;
    args.count = 3;
    device_->select_recent(args, *stream_);
    for (int head = 0; head < 4; ++head) EXPECT_EQ(chosen.of(head), expected) << length;
  }
}

// The share of `after` that `before` lacks.
double new_share(const std::vector<int>& before, const std::vector<int>& after) {
  const auto is_new = [&](int block) {
    return std::find(before.begin(), before.end(), block) == before.end();
  };
  return static_cast<double>(std::count_if(after.begin(), after.end(), is_new)) /
         static_cast<double>(after.size());
}

TEST_F(SelectOps, ATraceHasItsShareOfNewBlocksInEveryStep) {
  for (const float churn : {0.0F, 0.02F, 0.08F, 0.2F, 1.0F}) {
    Chosen chosen(4, 136);
    std::vector<int> before;
    for (int length = 130'000; length < 130'040; ++length) {
      use(length);
      device_->select_trace({&kv_, chosen.selection_address(), 1, 136, churn}, *stream_);
      const std::vector<int> blocks = chosen.of(3);
      ASSERT_EQ(blocks.size(), 136U);
      EXPECT_TRUE(std::ranges::is_sorted(blocks, std::ranges::less_equal())) << "twice the same";
      EXPECT_GE(blocks.front(), 4);
      EXPECT_LT(blocks.back(), (length + 1 - 64) / 16);
      if (!before.empty()) {
        EXPECT_NEAR(new_share(before, blocks), churn, 0.02) << length;
      }
      before = blocks;
    }
  }
}

TEST_F(SelectOps, ATraceTakesAllWhereThereAreFewerCandidates) {
  use(240);  // candidates are blocks 4 .. 10
  Chosen chosen(4, 20);
  device_->select_trace({&kv_, chosen.selection_address(), 1, 20, 0.5F}, *stream_);
  EXPECT_THAT(chosen.of(0), ElementsAre(4, 5, 6, 7, 8, 9, 10));
  use(0);
  device_->select_trace({&kv_, chosen.selection_address(), 1, 20, 0.5F}, *stream_);
  EXPECT_THAT(chosen.of(0), ElementsAre());
}

TEST_F(SelectOps, TopTakesTheGreatestExactProbabilities) {
  use(240);  // candidates are blocks 4 .. 10: 240 - 63 = token 177 lies in block 11
  constexpr int kPitch = 16;
  std::vector<float> block_max(4 * kPitch, -9.0F);
  const auto at = [&](int head, int block) -> float& {
    return block_max[static_cast<std::size_t>(head * kPitch + block)];
  };
  at(0, 0) = at(0, 3) = at(0, 11) = at(0, 15) = 5.0F;  // sink and local are no candidates
  at(0, 5) = 3.0F;
  at(1, 10) = 2.0F;
  at(1, 5) = 1.0F;
  at(2, 4) = 1.0F;
  at(3, 7) = at(3, 8) = 2.0F;
  const std::vector<float> lse = {0, 0, 0, 0};
  SelectTopArgs args{};
  args.block_max = block_max.data();
  args.lse = lse.data();
  args.pitch = kPitch;
  args.num_heads = 4;
  args.sequences = &kv_;
  args.rows = 1;
  args.layer = 1;
  args.maps_per_kv_head = 1;
  args.top_k = 2;
  Chosen by_kv_head(4, 2);
  args.selections = by_kv_head.selection_address();
  device_->select_top(args, *stream_);
  EXPECT_THAT(by_kv_head.of(2), ElementsAre(5, 10));
  EXPECT_THAT(by_kv_head.of(3), ElementsAre(7, 8));

  args.maps_per_kv_head = 2;
  args.top_k = 1;
  Chosen by_query_head(4, 2);
  args.selections = by_query_head.selection_address();
  device_->select_top(args, *stream_);
  EXPECT_THAT(by_query_head.of(2), ElementsAre(5, 10));
  EXPECT_THAT(by_query_head.of(3), ElementsAre(4, 7));
}

TEST_F(SelectOps, TopFallsBackToTheLatestWhereAttentionIsNotFinite) {
  use(240);
  std::vector<float> block_max(2 * 16, std::numeric_limits<float>::quiet_NaN());
  const std::vector<float> lse = {0, 0};
  SelectTopArgs args{};
  args.block_max = block_max.data();
  args.lse = lse.data();
  args.pitch = 16;
  args.num_heads = 2;
  args.sequences = &kv_;
  args.rows = 1;
  args.layer = 0;
  args.maps_per_kv_head = 1;
  args.top_k = 2;
  Chosen chosen(4, 2);
  args.selections = chosen.selection_address();
  device_->select_top(args, *stream_);
  EXPECT_THAT(chosen.of(0), ElementsAre(9, 10));
}

}  // namespace
}  // namespace foretoken::kernels
