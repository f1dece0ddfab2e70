// Reading a prefix against computing it, at given paces.
#include "kvstore/internal/read_choice.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace foretoken::kvstore {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using Mode = ReadChoice::Mode;
using Way = ReadChoice::Way;

constexpr double kTokens = 20'000;

class ReadChoiceTest : public testing::Test {
 protected:
  // Of a prefix that nobody has asked for yet.
  bool reads(Way way, double tokens = kTokens) {
    PrefixKey key;
    key.bytes[0] = static_cast<std::uint8_t>(++num_prefixes_);
    key.bytes[1] = static_cast<std::uint8_t>(num_prefixes_ / 256);
    return choice.reads(key, way, {tokens, tokens}, now);
  }

  ReadChoice choice{Mode::kAuto};
  TimePoint now{std::chrono::hours(1)};

 private:
  int num_prefixes_ = 0;
};

TEST_F(ReadChoiceTest, WhatIsNotKnownIsRead) {
  EXPECT_TRUE(reads(Way::kPromoted));
  choice.on_read(Way::kPromoted, kTokens, seconds(60));
  EXPECT_TRUE(reads(Way::kPromoted)) << "what computing takes isn't known";
  choice.on_computed(kTokens, seconds(1));
  EXPECT_FALSE(reads(Way::kPromoted));
  EXPECT_TRUE(reads(Way::kInPrefill)) << "never read yet";
}

TEST_F(ReadChoiceTest, TheFasterOfTheTwo) {
  choice.on_computed(kTokens, seconds(3));
  choice.on_read(Way::kInPrefill, kTokens, seconds(2));
  EXPECT_TRUE(reads(Way::kInPrefill));
  choice.on_read(Way::kInPrefill, 10 * kTokens, seconds(60));  // twice as slow as computing
  EXPECT_FALSE(reads(Way::kInPrefill));
  choice.on_computed(10 * kTokens, seconds(120));  // others compute, too
  EXPECT_TRUE(reads(Way::kInPrefill));
}

// Of what there is to compute, only some may be to be read.
TEST_F(ReadChoiceTest, AShortReadMaySaveMuch) {
  choice.on_computed(kTokens, seconds(1));
  choice.on_read(Way::kPromoted, kTokens, seconds(2));
  PrefixKey key;
  EXPECT_TRUE(choice.reads(key, Way::kPromoted, {256, 512}, now));
  now += ReadChoice::kSame;
  EXPECT_FALSE(choice.reads(key, Way::kPromoted, {256, 256}, now));
}

TEST_F(ReadChoiceTest, ALongPromptCountsMoreThanAShortOne) {
  choice.on_read(Way::kPromoted, kTokens, seconds(2));
  choice.on_computed(100, seconds(1));  // a first one, with all that starting takes
  EXPECT_TRUE(reads(Way::kPromoted));
  choice.on_computed(4 * kTokens, seconds(4));
  EXPECT_FALSE(reads(Way::kPromoted));
  choice.on_computed(100, milliseconds(100));
  EXPECT_FALSE(reads(Way::kPromoted));
}

TEST_F(ReadChoiceTest, AllRanksAreToldTheSame) {
  PrefixKey key;
  const ReadChoice::Tokens tokens{kTokens, kTokens};
  EXPECT_TRUE(choice.reads(key, Way::kInPrefill, tokens, now));
  choice.on_computed(kTokens, seconds(1));
  choice.on_read(Way::kInPrefill, kTokens, seconds(2));
  now += ReadChoice::kSame - milliseconds(1);
  EXPECT_TRUE(choice.reads(key, Way::kInPrefill, tokens, now));
  now += milliseconds(1);
  EXPECT_FALSE(choice.reads(key, Way::kInPrefill, tokens, now));
  EXPECT_TRUE(choice.is_passed_over(key, Way::kInPrefill, now));
  choice.on_read(Way::kInPrefill, 10 * kTokens, seconds(1));
  EXPECT_FALSE(choice.reads(key, Way::kInPrefill, tokens, now));
  now += ReadChoice::kSame;
  EXPECT_FALSE(choice.is_passed_over(key, Way::kInPrefill, now));
  EXPECT_TRUE(choice.reads(key, Way::kInPrefill, tokens, now));
}

// A disk that was slow for a while: it costs an eighth of the time to find out.
TEST_F(ReadChoiceTest, ASlowDiskIsTriedAgain) {
  for (const int slower : {2, 10}) {
    choice.on_computed(kTokens, seconds(1));
    choice.on_read(Way::kPromoted, 100 * kTokens, seconds(100 * slower));
    int num_computed = 0;
    while (!reads(Way::kPromoted)) ++num_computed;
    EXPECT_NEAR(num_computed, slower * ReadChoice::kTrialShare, 1);
    choice.on_read(Way::kPromoted, kTokens, seconds(slower));
    EXPECT_FALSE(reads(Way::kPromoted)) << "it is slow still";
    while (!reads(Way::kPromoted)) {
    }
    choice.on_read(Way::kPromoted, kTokens, milliseconds(500));
    for (int i = 0; i < 10; ++i) EXPECT_TRUE(reads(Way::kPromoted)) << "it is fast again";
  }
}

TEST_F(ReadChoiceTest, AlwaysIsAlways) {
  choice.on_computed(kTokens, seconds(1));
  choice.on_read(Way::kPromoted, kTokens, seconds(2));
  ReadChoice always(Mode::kAlways);
  always.on_computed(kTokens, seconds(1));
  always.on_read(Way::kPromoted, kTokens, seconds(2));
  EXPECT_TRUE(always.reads(PrefixKey{}, Way::kPromoted, {kTokens, kTokens}, now));
  EXPECT_FALSE(always.is_passed_over(PrefixKey{}, Way::kPromoted, now));
}

}  // namespace
}  // namespace foretoken::kvstore
