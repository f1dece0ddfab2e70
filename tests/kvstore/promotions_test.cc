// Prefixes on their way from a file in memory, with a clock of the test's own: who is told to come
// again, what is held for them, and how long.
#include "kvstore/internal/promotions.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/kvstore/tier_on_file.h"

namespace foretoken::kvstore {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::uint32_t kSlabs = 4;  // a head

class PromotionsTest : public testing::Test {
 protected:
  PromotionsTest() {
    book.set_ready(kSlabs);
    for (std::uint32_t i = 0; i < 2; ++i) {
      keys.push_back(test_name(0, i).key);
      for (int head = 0; head < 2; ++head) EXPECT_TRUE(disk.store(test_name(head, i)));
    }
  }
  // Reads end when the test says so.
  void hold_reads() {
    disk.device->fault = [](const IoOperation& operation) {
      return operation.direction == IoDirection::kRead ? IoFault::kHeld : IoFault::kNone;
    };
  }
  void advance() {
    do {
      for (const SlabName& name : mover.advance(disk.now)) promotions.on_ended(name, disk.now);
    } while (mover.has_more(disk.now));
    promotions.forget_late(disk.now);
    book.check();
  }
  bool is_coming(int first_head = 0, int num_heads = 2) {
    return promotions.is_coming(first_head, num_heads, keys, disk.now);
  }
  std::int64_t used() const { return book.stat().slabs_used; }

  FileBytes file;
  TierOnFile disk{file, 16};
  std::vector<std::byte> arena = std::vector<std::byte>(2 * kSlabs * kTestModel.slab_bytes());
  StoreBook book{2, kSlabs};
  TierMover mover{book, *disk.tier,
                  [this](int head, SlabIndex slab) {
                    const auto place = static_cast<std::size_t>(head) * kSlabs + raw(slab);
                    return arena.data() + place * kTestModel.slab_bytes();
                  },
                  8};
  ReadChoice choice{ReadChoice::Mode::kAuto};
  Promotions promotions{book, mover, choice, 2};
  std::vector<PrefixKey> keys;
};

TEST_F(PromotionsTest, TheSecondTryIsAHit) {
  hold_reads();
  EXPECT_TRUE(is_coming());
  advance();
  EXPECT_TRUE(is_coming()) << "asked for once more, started once";
  disk.device->release_held();
  advance();
  EXPECT_EQ(disk.tier->stat().slabs_read, 4);
  for (std::uint32_t i = 0; i < kSlabs; ++i) {  // whoever needs room meanwhile doesn't get this
    if (const auto slab = book.take_slab(0)) book.return_slab(0, *slab);
  }
  EXPECT_EQ(used(), 2) << "held";
  EXPECT_FALSE(is_coming());
  EXPECT_EQ(used(), 0) << "the reservation's now";
  const LeaseId rank = book.open_lease({0, 0, Epoch{1}, 0, 2});
  EXPECT_EQ(book.reserve(rank, SequenceId{1}, keys, 3)->head_hits, (std::vector<int>{2, 2}));
}

TEST_F(PromotionsTest, WhatTheArenaHasOfThePrefixIsHeldToo) {
  const LeaseId rank = book.open_lease({0, 0, Epoch{1}, 0, 2});
  ASSERT_TRUE(book.reserve(rank, SequenceId{1}, {}, 1));
  ASSERT_TRUE(book.commit(rank, SequenceId{1}, 0, keys[0]));
  ASSERT_TRUE(book.release(rank, SequenceId{1}));
  hold_reads();
  EXPECT_TRUE(is_coming());
  EXPECT_EQ(used(), 2);
}

TEST_F(PromotionsTest, NoRankIsLetThroughBeforeTheOthersHeadsHaveCome) {
  EXPECT_TRUE(is_coming(0, 1));
  advance();
  hold_reads();
  EXPECT_TRUE(is_coming(1, 1));
  EXPECT_TRUE(is_coming(0, 1)) << "its own head is there";
  disk.device->release_held();
  advance();
  EXPECT_FALSE(is_coming(0, 1));
  EXPECT_FALSE(is_coming(1, 1));
}

TEST_F(PromotionsTest, WhatNobodyComesForIsGivenBack) {
  EXPECT_TRUE(is_coming());
  advance();
  EXPECT_EQ(used(), 2);
  disk.wait(Promotions::kComeAgain - milliseconds(1));
  advance();
  EXPECT_EQ(used(), 2);
  EXPECT_EQ(promotions.deadline(), disk.now + milliseconds(1));
  disk.wait(milliseconds(1));
  advance();
  EXPECT_EQ(used(), 0);
  EXPECT_EQ(promotions.num_prefixes(), 0U);
  EXPECT_FALSE(is_coming()) << "still in the arena";
}

TEST_F(PromotionsTest, ADiskThatDoesNotAnswerCostsSeconds) {
  hold_reads();
  EXPECT_TRUE(is_coming());
  advance();
  disk.wait(seconds(1));
  advance();  // the tier gives up
  EXPECT_FALSE(is_coming());
  EXPECT_EQ(used(), 0);
}

TEST_F(PromotionsTest, ASlowDiskIsWaitedForNoLongerThanTheLimit) {
  hold_reads();
  EXPECT_TRUE(is_coming(0, 1));
  EXPECT_TRUE(is_coming(1, 1));
  disk.wait(Promotions::kLimit - milliseconds(1));
  EXPECT_TRUE(is_coming(0, 1));
  disk.wait(milliseconds(1));
  EXPECT_FALSE(is_coming(0, 1));
  EXPECT_FALSE(is_coming(1, 1)) << "the same limit for all ranks";
  EXPECT_FALSE(is_coming(0, 1)) << "also when another rank's refusal brings it here again";
  disk.device->release_held();
  advance();
  EXPECT_EQ(used(), 0) << "what comes too late is cached";
  disk.wait(Promotions::kComeAgain);
  advance();
  EXPECT_EQ(promotions.num_prefixes(), 0U);
}

// A prefix of 512 tokens, of which nothing is in the arena yet.
TEST_F(PromotionsTest, WhatIsComputedSoonerIsNotRead) {
  choice.on_computed(1'000, seconds(1));
  choice.on_read(ReadChoice::Way::kPromoted, 1'000, seconds(2));
  EXPECT_FALSE(is_coming(0, 1));
  EXPECT_FALSE(is_coming(1, 1)) << "the same for all ranks";
  EXPECT_TRUE(choice.is_passed_over(keys.back(), ReadChoice::Way::kPromoted, disk.now));
  EXPECT_EQ(promotions.num_prefixes(), 0U);
  advance();
  EXPECT_EQ(disk.tier->stat().slabs_read, 0);
}

// The first segment alone is missing: reading it saves computing both.
TEST_F(PromotionsTest, WhatTheArenaHasBehindAGapIsWeighedToo) {
  const LeaseId rank = book.open_lease({0, 0, Epoch{1}, 0, 2});
  ASSERT_TRUE(book.reserve(rank, SequenceId{1}, {}, 2));
  ASSERT_TRUE(book.commit(rank, SequenceId{1}, 1, keys[1]));
  ASSERT_TRUE(book.release(rank, SequenceId{1}));
  const auto tokens = promotions.tokens_to_read(0, 2, keys, disk.now);
  EXPECT_EQ(tokens.read, 256);
  EXPECT_EQ(tokens.compute, 512);
  EXPECT_EQ(promotions.tokens_to_read(0, 2, std::span(keys).last(1), disk.now).compute, 0);
}

TEST_F(PromotionsTest, WhatReadingTakesIsTold) {
  choice.on_computed(512, seconds(3));
  hold_reads();
  EXPECT_TRUE(is_coming()) << "nothing is known yet";
  advance();
  disk.wait(milliseconds(900));
  disk.device->release_held();
  advance();
  EXPECT_FALSE(is_coming());
  const ReadChoice::Tokens tokens{512, 512};
  const PrefixKey other = test_name(0, 7).key;
  EXPECT_TRUE(choice.reads(other, ReadChoice::Way::kPromoted, tokens, disk.now));
  disk.wait(ReadChoice::kSame);
  choice.on_computed(100'000, seconds(100));  // 512 take 0.51 s now
  EXPECT_FALSE(choice.reads(other, ReadChoice::Way::kPromoted, tokens, disk.now));
}

TEST_F(PromotionsTest, AFailedReadIsAShorterHit) {
  disk.device->fault = [](const IoOperation&) { return IoFault::kError; };
  EXPECT_TRUE(is_coming());
  advance();
  EXPECT_FALSE(is_coming());
  EXPECT_EQ(used(), 0);
}

}  // namespace
}  // namespace foretoken::kvstore
