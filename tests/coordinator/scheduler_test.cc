#include "coordinator/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace foretoken::coordinator {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int kRanks = 2;

PrefixKey key_of(int number) {
  PrefixKey key;
  key.bytes[0] = static_cast<std::uint8_t>(number);
  return key;
}

// Sequence `id` of `length` prompt tokens. Its segments' keys are first_key, first_key + 1, ...
NewSequence sequence(int id, int length, int max_new_tokens, int first_key = 0) {
  NewSequence made;
  made.admit.sequence = SequenceId(id);
  made.admit.prompt.assign(static_cast<std::size_t>(length), 7);
  made.admit.max_length = length + max_new_tokens;
  made.max_new_tokens = max_new_tokens;
  for (int i = 0; i < length / kSegmentTokens; ++i) {
    made.segment_keys.push_back(key_of(first_key + i));
  }
  return made;
}

class SchedulerTest : public ::testing::Test {
 protected:
  explicit SchedulerTest(SchedulerConfig config = {Epoch{1}, 4, 3, 64}) : scheduler_(config) {}

  StepPlan plan() {
    auto made = scheduler_.next_plan();
    EXPECT_TRUE(made);
    return made.value_or(StepPlan{});
  }

  // What ranks answer to a plan: admissions with `reusable`, a token for whatever samples.
  std::vector<StepResult> answers(const StepPlan& to, std::vector<int> reusable = {0, 0}) {
    std::vector<StepResult> results;
    for (int rank = 0; rank < kRanks; ++rank) {
      StepResult result;
      result.step = to.step;
      result.rank = rank;
      for (const auto& admit : to.admits) {
        result.admits.push_back({admit.sequence, reusable[std::size_t(rank)], std::nullopt, false});
        lengths_[admit.sequence] = static_cast<std::int64_t>(admit.prompt.size());
      }
      for (const auto& start : to.starts) {
        result.admits.push_back({start.sequence, start.reused_tokens, std::nullopt, false});
      }
      for (const auto id : to.releases) {
        KvReport report;
        report.blocks_fetched = 10;
        report.predictor_fallbacks = 1;
        result.stats.push_back({id, report});
      }
      results.push_back(std::move(result));
    }
    for (const auto& item : to.prefills) {
      if (item.layer_end == 4 && item.token_end == lengths_[item.sequence]) {
        add_token(results[0], item.sequence);
      }
    }
    for (const auto id : to.decodes) add_token(results[0], id);
    return results;
  }
  void add_token(StepResult& result, SequenceId id) {
    result.tokens.push_back({id, lengths_[id]++, {}});
  }

  std::vector<StepEvent> feed(const std::vector<StepResult>& results) {
    auto events = scheduler_.on_results(results);
    EXPECT_TRUE(events) << events.error().message;
    return *std::move(events);
  }
  std::vector<StepEvent> step(std::vector<int> reusable = {0, 0}) {
    return feed(answers(plan(), std::move(reusable)));
  }
  template <typename T>
  static std::vector<T> only(const std::vector<StepEvent>& events) {
    std::vector<T> found;
    for (const auto& event : events) {
      if (const auto* one = std::get_if<T>(&event)) found.push_back(*one);
    }
    return found;
  }

  Scheduler scheduler_;
  std::map<SequenceId, std::int64_t> lengths_;
};

TEST_F(SchedulerTest, HasNothingToDoWithoutSequences) { EXPECT_FALSE(scheduler_.next_plan()); }

TEST_F(SchedulerTest, WalksASequenceFromAdmissionToRelease) {
  scheduler_.add(sequence(1, 30, 3));
  const auto admission = plan();
  EXPECT_EQ(admission.step, StepNumber{1});
  EXPECT_EQ(admission.epoch, Epoch{1});
  ASSERT_EQ(admission.admits.size(), 1U);
  EXPECT_FALSE(scheduler_.next_plan());  // nothing until the ranks have answered
  EXPECT_EQ(only<Admitted>(feed(answers(admission))).size(), 1U);

  const auto prefill = plan();
  ASSERT_EQ(prefill.starts.size(), 1U);
  ASSERT_EQ(prefill.prefills.size(), 1U);
  EXPECT_EQ(prefill.prefills[0].layer_end, 4);
  EXPECT_EQ(prefill.prefills[0].token_end, 30);
  const auto ahead = plan();  // one step ahead: the first token is not back yet
  EXPECT_THAT(ahead.decodes, ElementsAre(SequenceId{1}));
  EXPECT_FALSE(scheduler_.next_plan());  // two are out
  EXPECT_EQ(only<Sampled>(feed(answers(prefill)))[0].position, 30);

  const auto last = plan();
  EXPECT_THAT(last.decodes, ElementsAre(SequenceId{1}));
  feed(answers(ahead));
  EXPECT_FALSE(scheduler_.next_plan()) << "a decode past max_tokens";
  feed(answers(last));

  EXPECT_TRUE(scheduler_.release(SequenceId{1}));
  const auto release = plan();
  EXPECT_THAT(release.releases, ElementsAre(SequenceId{1}));
  const auto released = only<Released>(feed(answers(release)));
  ASSERT_EQ(released.size(), 1U);
  EXPECT_EQ(released[0].kv.blocks_fetched, 10 * kRanks);
  EXPECT_EQ(released[0].kv.predictor_fallbacks, kRanks);
  EXPECT_EQ(scheduler_.num_sequences(), 0U);
  EXPECT_FALSE(scheduler_.next_plan());
}

TEST_F(SchedulerTest, TokensAfterAReleaseAreDropped) {
  scheduler_.add(sequence(1, 30, 10));
  step();
  const auto prefill = plan();
  const auto ahead = plan();
  EXPECT_EQ(only<Sampled>(feed(answers(prefill))).size(), 1U);
  scheduler_.release(SequenceId{1});  // a stop string, say
  const auto release = plan();
  EXPECT_THAT(release.decodes, IsEmpty());
  EXPECT_THAT(only<Sampled>(feed(answers(ahead))), IsEmpty());
  EXPECT_EQ(only<Released>(feed(answers(release))).size(), 1U);
}

TEST_F(SchedulerTest, ReusesWhatAllRanksHave) {
  scheduler_.add(sequence(1, 900, 1, 10));
  const auto admission = plan();
  // At least 64 tokens are always computed: (900 - 64) / 256 segments may be reused.
  EXPECT_THAT(admission.admits[0].prefix_keys, ElementsAre(key_of(10), key_of(11), key_of(12)));
  feed(answers(admission, {768, 512}));
  const auto start = plan();
  EXPECT_EQ(start.starts[0].reused_tokens, 512);
  EXPECT_FALSE(scheduler_.next_plan());  // a rank may find no room for what it must swap
  feed(answers(start));
  EXPECT_EQ(plan().prefills[0].token_begin, 512);
}

TEST_F(SchedulerTest, AStartThatFailsOnOneRankReleasesAllOfThemAndHoldsUpNobody) {
  scheduler_.add(sequence(1, 900, 1, 10));
  scheduler_.add(sequence(2, 10, 5));
  const auto admission = plan();
  feed(answers(admission, {768, 512}));
  const auto start = plan();
  EXPECT_EQ(start.starts.size(), 2U);
  EXPECT_THAT(start.prefills, IsEmpty());  // first come, first served
  auto results = answers(start);
  results[1].admits[0].error = Error{ErrorCode::kExhausted, "no empty slabs"};
  const auto refused = only<NotAdmitted>(feed(results));
  ASSERT_EQ(refused.size(), 1U);
  EXPECT_EQ(refused[0].sequence, SequenceId{1});
  const auto next = plan();
  EXPECT_THAT(next.releases, ElementsAre(SequenceId{1}));
  ASSERT_EQ(next.prefills.size(), 1U);
  EXPECT_EQ(next.prefills[0].sequence, SequenceId{2});
}

TEST_F(SchedulerTest, LeastReusableLengths) {
  for (const auto& [length, keys] : std::map<int, std::size_t>{
           {1, 0}, {64, 0}, {256, 0}, {319, 0}, {320, 1}, {575, 1}, {576, 2}}) {
    Scheduler scheduler({Epoch{1}, 4, 3, 64});
    scheduler.add(sequence(1, length, 1));
    EXPECT_EQ(scheduler.next_plan()->admits[0].prefix_keys.size(), keys) << length;
  }
}

TEST_F(SchedulerTest, PublishesPromptSegmentsOnceComputed) {
  scheduler_.add(sequence(1, 600, 1, 10));
  step();
  std::vector<StepEvent> events;
  while (only<Sampled>(events).empty()) events = step();
  scheduler_.release(SequenceId{1});  // its one token has come; the segments are of use to others
  const auto publish = plan();
  EXPECT_THAT(publish.releases, IsEmpty());
  ASSERT_EQ(publish.publishes.size(), 2U);
  EXPECT_EQ(publish.publishes[1].index, 1);
  EXPECT_EQ(publish.publishes[1].key, key_of(11));
  EXPECT_THAT(plan().releases, ElementsAre(SequenceId{1}));
}

// What was computed from wrong KV must not get a key, whether or not somebody still waits for it.
TEST_F(SchedulerTest, WhatALostSequenceComputedIsNotPublished) {
  for (const int id : {1, 2}) {
    const bool is_cancelled = id == 2;
    scheduler_.add(sequence(id, 2 * kSegmentTokens, 5, 10 * id));
    step();
    auto last_of_prompt = answers(plan());
    while (last_of_prompt[0].tokens.empty()) {
      feed(last_of_prompt);
      last_of_prompt = answers(plan());
    }
    const bool is_known = !is_cancelled || scheduler_.release(SequenceId(id));
    EXPECT_TRUE(is_known);
    const Error error{ErrorCode::kCorrupt, "KV blocks failed their check"};
    last_of_prompt[0].lost.push_back({SequenceId(id), error, 2});
    last_of_prompt[1].lost.push_back({SequenceId(id), error, 3});
    const auto events = feed(last_of_prompt);
    EXPECT_THAT(only<Sampled>(events), IsEmpty());
    const auto lost = only<Lost>(events);
    ASSERT_EQ(lost.size(), is_cancelled ? 0U : 1U);
    for (const Lost& event : lost) EXPECT_EQ(event.checksum_failures, 5);
    const auto release = plan();
    EXPECT_THAT(release.publishes, IsEmpty());
    EXPECT_THAT(release.releases, ElementsAre(SequenceId(id)));
    feed(answers(release));
  }
}

TEST_F(SchedulerTest, ReusedSegmentsAreNotPublishedAgain) {
  scheduler_.add(sequence(1, 600, 5, 10));
  step({512, 512});
  step();  // the start
  step();  // 88 tokens by 4 layers, of 256 token-layers a step: two steps
  step();
  EXPECT_THAT(plan().publishes, IsEmpty());
}

TEST_F(SchedulerTest, CutsPrefillByLayers) {
  scheduler_.add(sequence(1, 100, 1));
  step();
  const auto first = plan();  // 256 token-layers: two layers of 100 tokens
  ASSERT_EQ(first.prefills.size(), 1U);
  EXPECT_EQ(first.prefills[0].layer_end, 2);
  EXPECT_EQ(first.prefills[0].token_end, 100);
  const auto second = plan();
  ASSERT_EQ(second.prefills.size(), 1U);
  EXPECT_EQ(second.prefills[0].layer_begin, 2);
  EXPECT_EQ(second.prefills[0].layer_end, 4);
}

TEST_F(SchedulerTest, CutsALayerThatNoStepCanHold) {
  scheduler_.add(sequence(1, 600, 1));
  step();
  step();
  const auto first = plan();  // 256 token-layers: a segment
  ASSERT_EQ(first.prefills.size(), 1U);
  EXPECT_EQ(first.prefills[0].layer_end, 1);
  EXPECT_EQ(first.prefills[0].token_end, 256);
  feed(answers(first));
  feed(answers(plan()));
  const auto third = plan();  // what is left of the layer, but no crumb of the next
  ASSERT_EQ(third.prefills.size(), 1U);
  EXPECT_EQ(third.prefills[0].token_begin, 512);
  EXPECT_EQ(third.prefills[0].token_end, 600);
  EXPECT_EQ(plan().prefills[0].layer_begin, 1);
}

// Whatever the lengths, items cover each layer of the prompt once and in order, within the budget.
TEST_F(SchedulerTest, PrefillItemsCoverEachLayerInOrder) {
  for (const int tokens : {1, 15, 63, 64, 65, 255, 256, 257, 1000}) {
    for (const int budget : {1, 3, 16, 64, 100, 512}) {
      Scheduler scheduler({Epoch{1}, 4, 3, budget});
      scheduler.add(sequence(1, tokens, 1));
      ASSERT_TRUE(scheduler.on_results(answers(*scheduler.next_plan())));
      const bool has_prefix = tokens >= kSegmentTokens + kLocalTokens;  // its start is waited for
      if (has_prefix) {
        ASSERT_TRUE(scheduler.on_results(answers(*scheduler.next_plan())));
      }
      int layer = 0;
      std::int64_t token = 0;
      while (layer < 4) {
        const auto made = scheduler.next_plan();
        ASSERT_TRUE(made) << tokens << " " << budget;
        std::int64_t cost = 0;
        for (const auto& item : made->prefills) {
          ASSERT_EQ(item.layer_begin, layer);
          ASSERT_EQ(item.token_begin, token);
          ASSERT_GT(item.token_end, token);
          const bool whole = item.token_end == tokens;
          ASSERT_TRUE(item.layer_end == layer + 1 || (whole && token == 0));
          cost += (item.layer_end - item.layer_begin) * (item.token_end - item.token_begin);
          layer = whole ? item.layer_end : layer;
          token = whole ? 0 : item.token_end;
        }
        ASSERT_GT(cost, 0);
        ASSERT_LE(cost, 4 * budget);
        if (layer == 4) break;
        ASSERT_TRUE(scheduler.on_results(answers(*made)));
      }
    }
  }
}

TEST_F(SchedulerTest, OthersDecodeWhileOnePrefills) {
  scheduler_.add(sequence(1, 10, 100));
  step();
  step();
  scheduler_.add(sequence(2, 400, 5));
  scheduler_.add(sequence(3, 400, 5, 50));
  const auto admission = plan();
  EXPECT_EQ(admission.admits.size(), 2U);
  EXPECT_THAT(admission.decodes, ElementsAre(SequenceId{1}));
  feed(answers(admission));
  const auto start = plan();
  EXPECT_EQ(start.starts.size(), 2U);
  feed(answers(start));
  const auto prefill = plan();
  EXPECT_FALSE(prefill.prefills.empty());
  EXPECT_THAT(prefill.decodes, ElementsAre(SequenceId{1}));
  for (const auto& item : prefill.prefills) EXPECT_EQ(item.sequence, SequenceId{2});
}

// A group whose steps take as long as this says, of which the scheduler knows the form alone: keys
// cost half of what it believes.
class BoundedSchedulerTest : public SchedulerTest {
 protected:
  static constexpr int kTokens = 5000;  // of the prompt that comes second
  static constexpr double kDecodeUs = 4000;
  static constexpr double kBoundUs = 20'000;

  BoundedSchedulerTest() : SchedulerTest(config()) {}
  static SchedulerConfig config() {
    return {.epoch = Epoch{1},
            .num_layers = 4,
            .max_num_seqs = 3,
            .max_batched_tokens = 10'000,
            .max_inter_token = std::chrono::milliseconds(20),
            .attention_tokens = 1000};
  }

  double time_of(const StepPlan& plan) const {
    double us = plan.decodes.empty() ? 0 : kDecodeUs;
    for (const auto& item : plan.prefills) {
      const double middle = static_cast<double>(item.token_begin + item.token_end) / 2;
      us += static_cast<double>(item.layer_end - item.layer_begin) *
            static_cast<double>(item.token_end - item.token_begin) * unit_us_ * (1 + middle / 2000);
    }
    return us;
  }
  void take(const StepPlan& plan) {
    auto results = answers(plan);
    results[1].step_us = static_cast<std::int64_t>(time_of(plan));  // the slower rank counts
    feed(results);
  }
  // The second prompt's plans, while the first sequence decodes.
  std::vector<StepPlan> plans_beside_a_decode() {
    scheduler_.add(sequence(1, 100, 100'000));
    take(plan());
    take(plan());
    scheduler_.add(sequence(2, kTokens, 2, 50));
    std::vector<StepPlan> plans;
    while (lengths_[SequenceId{2}] <= kTokens) {
      plans.push_back(plan());
      take(plans.back());
    }
    return plans;
  }

  double unit_us_ = 1.5;
};

TEST_F(BoundedSchedulerTest, StepsBesideADecodeKeepToTheBound) {
  double longest = 0;
  double sum = 0;
  int prefills = 0;
  for (const auto& made : plans_beside_a_decode()) {
    EXPECT_THAT(made.decodes, ::testing::Contains(SequenceId{1}));
    longest = std::max(longest, time_of(made));
    if (made.prefills.empty()) continue;
    sum += time_of(made);
    ++prefills;
  }
  EXPECT_LT(longest, 1.1 * kBoundUs);
  EXPECT_GT(sum / prefills, 0.6 * kBoundUs) << "in " << prefills << " steps";
}

// Else the decoding beside it would be thought slow, and prefill would get a share of that.
TEST_F(BoundedSchedulerTest, AnAdmissionThatTakesLongIsNoSlowDecode) {
  scheduler_.add(sequence(1, 100, 100'000));
  take(plan());
  take(plan());
  scheduler_.add(sequence(2, kTokens, 2, 50));
  const auto admission = plan();
  ASSERT_EQ(admission.admits.size(), 1U);
  ASSERT_FALSE(admission.decodes.empty());
  auto results = answers(admission);
  results[0].step_us = 1'000'000;
  feed(results);
  int prefills = 0;
  while (lengths_[SequenceId{2}] <= kTokens) {
    const auto made = plan();
    EXPECT_LT(time_of(made), 1.1 * kBoundUs);
    prefills += !made.prefills.empty();
    take(made);
  }
  EXPECT_LT(prefills, 20);
}

TEST_F(BoundedSchedulerTest, TellsOfAStepThatTookLongerThanTheBound) {
  scheduler_.add(sequence(1, 100, 100'000));
  take(plan());
  take(plan());
  const auto after = [&](std::int64_t step_us) {
    auto results = answers(plan());
    results[0].step_us = 1'000;
    results[1].step_us = step_us;
    results[1].launch_us = 7'000;
    return only<LateStep>(feed(results));
  };
  EXPECT_THAT(after(20'000), IsEmpty());
  const auto late = after(20'001);
  ASSERT_EQ(late.size(), 1U);
  EXPECT_EQ(late[0].time, std::chrono::microseconds(20'001));
  EXPECT_EQ(late[0].rank, 1);
  EXPECT_EQ(late[0].launching, std::chrono::microseconds(7'000));
  EXPECT_EQ(late[0].num_decodes, 1);
}

TEST_F(BoundedSchedulerTest, AdaptsToAGroupThatBecomesSlower) {
  scheduler_.add(sequence(1, 100, 100'000));
  take(plan());
  take(plan());
  scheduler_.add(sequence(2, kTokens, 2, 50));
  for (int i = 0; i < 5; ++i) take(plan());
  unit_us_ *= 3;
  take(plan());  // here it shows
  while (lengths_[SequenceId{2}] <= kTokens) {
    const auto made = plan();
    EXPECT_LT(time_of(made), 1.1 * kBoundUs);
    take(made);
  }
}

TEST_F(BoundedSchedulerTest, APromptGetsOnWhateverItsTokensCost) {
  unit_us_ = 1e6;
  scheduler_.add(sequence(1, 10, 100));
  take(plan());
  take(plan());
  scheduler_.add(sequence(2, 200, 2));
  take(plan());
  const auto made = plan();
  ASSERT_EQ(made.prefills.size(), 1U);
  EXPECT_EQ(made.prefills[0].layer_end, 1);
  EXPECT_EQ(made.prefills[0].token_end, kBlockTokens);
}

TEST_F(BoundedSchedulerTest, WhereNobodyDecodesAStepTakesTheWholeBudget) {
  scheduler_.add(sequence(1, kTokens, 2));
  take(plan());
  take(plan());
  const auto made = plan();
  ASSERT_EQ(made.prefills.size(), 1U);
  EXPECT_EQ(made.prefills[0].layer_end, 4);
  EXPECT_EQ(made.prefills[0].token_end, kTokens);
}

TEST_F(SchedulerTest, HasRoomForAsManyAsMayDecode) {
  for (int id = 1; id <= 3; ++id) {
    ASSERT_TRUE(scheduler_.has_room({}));
    scheduler_.add(sequence(id, 10, 5));
  }
  EXPECT_FALSE(scheduler_.has_room({}));
  step();
  scheduler_.release(SequenceId{2});
  EXPECT_FALSE(scheduler_.has_room({}));
  plan();  // with the release: what is admitted after it finds the room
  EXPECT_TRUE(scheduler_.has_room({}));
}

class WideSchedulerTest : public SchedulerTest {
 protected:
  WideSchedulerTest() : SchedulerTest({Epoch{1}, 4, 8, 64}) {}
};

// What waits for its turn has its memory already.
TEST_F(WideSchedulerTest, FewWaitForThePrefillOfOthers) {
  for (int id = 1; id <= 4; ++id) {
    ASSERT_TRUE(scheduler_.has_room({}));
    scheduler_.add(sequence(id, 1000, 3, 100 * id));
  }
  EXPECT_FALSE(scheduler_.has_room({}));
  for (int i = 0; i < 3; ++i) step();  // admitted, started, the first one's prefill begun
  ASSERT_TRUE(scheduler_.has_room({}));
  scheduler_.add(sequence(5, 1000, 3, 500));
  for (int i = 0; i < 3; ++i) step();
  EXPECT_FALSE(scheduler_.has_room({}));
}

TEST_F(SchedulerTest, WaitsForAPrefixThatIsBeingComputed) {
  scheduler_.add(sequence(1, 600, 5, 10));
  EXPECT_FALSE(scheduler_.has_room({key_of(10)}));
  EXPECT_TRUE(scheduler_.has_room({key_of(20)}));
  EXPECT_TRUE(scheduler_.has_room({}));
  step();
  std::vector<StepEvent> events;
  while (only<Sampled>(events).empty()) events = step();
  EXPECT_TRUE(scheduler_.has_room({key_of(10)}));
}

TEST_F(SchedulerTest, ASequenceThatNobodyHeardOfIsForgottenAtOnce) {
  scheduler_.add(sequence(1, 10, 5));
  EXPECT_FALSE(scheduler_.release(SequenceId{1}));
  EXPECT_FALSE(scheduler_.next_plan());
}

TEST_F(SchedulerTest, ReleaseBeforeTheAdmissionIsAnswered) {
  scheduler_.add(sequence(1, 10, 5));
  const auto admission = plan();
  EXPECT_TRUE(scheduler_.release(SequenceId{1}));
  const auto release = plan();
  EXPECT_THAT(release.releases, ElementsAre(SequenceId{1}));
  EXPECT_THAT(feed(answers(admission)), IsEmpty());
  EXPECT_EQ(only<Released>(feed(answers(release))).size(), 1U);
}

TEST_F(SchedulerTest, ARefusalOnOneRankReleasesAllOfThem) {
  scheduler_.add(sequence(1, 10, 5));
  auto results = answers(plan());
  results[1].admits[0].error = Error{ErrorCode::kExhausted, "full"};
  const auto refused = only<NotAdmitted>(feed(results));
  ASSERT_EQ(refused.size(), 1U);
  EXPECT_EQ(refused[0].error.code, ErrorCode::kExhausted);
  const auto release = plan();
  EXPECT_THAT(release.releases, ElementsAre(SequenceId{1}));
  EXPECT_THAT(feed(answers(release)), IsEmpty());  // nobody waits for it
  EXPECT_EQ(scheduler_.num_sequences(), 0U);
}

TEST_F(SchedulerTest, WhatIsWrongCountsMoreThanWhatIsFull) {
  scheduler_.add(sequence(1, 10, 5));
  auto results = answers(plan());
  results[0].admits[0].error = Error{ErrorCode::kInvalidArgument, "too long"};
  results[1].admits[0].error = Error{ErrorCode::kExhausted, "full"};
  EXPECT_EQ(only<NotAdmitted>(feed(results))[0].error.code, ErrorCode::kInvalidArgument);
}

TEST_F(SchedulerTest, WhatIsFullCountsMoreThanWhatComesSoon) {
  scheduler_.add(sequence(1, 10, 5));
  auto results = answers(plan());
  results[0].admits[0].error = Error{ErrorCode::kPending, "on its way"};
  results[1].admits[0].error = Error{ErrorCode::kExhausted, "full"};
  EXPECT_EQ(only<NotAdmitted>(feed(results))[0].error.code, ErrorCode::kExhausted);
}

TEST_F(SchedulerTest, RanksThatContradictBreakTheGroup) {
  scheduler_.add(sequence(1, 10, 5));
  step();
  const auto good = answers(plan());
  const auto broken = [&](auto change) {
    auto scheduler = scheduler_;  // each starts from the same place
    auto results = good;
    change(results);
    const auto events = scheduler.on_results(results);
    return !events && events.error().code == ErrorCode::kInternal;
  };
  EXPECT_FALSE(broken([](auto&) {}));
  EXPECT_TRUE(broken([](auto& r) { r[1].token_digest = 5; }));
  EXPECT_TRUE(broken([](auto& r) { r[0].tokens.clear(); }));
  EXPECT_TRUE(broken([](auto& r) { r[0].tokens[0].sequence = SequenceId{9}; }));
  EXPECT_TRUE(broken([](auto& r) { r[0].tokens.push_back(r[0].tokens[0]); }));
  EXPECT_TRUE(broken([](auto& r) { r[0].step = r[1].step = StepNumber{9}; }));
}

// Policy auto. Rank 1 has room for so many tokens of dense sequences' greatest lengths.
class SpillingSchedulerTest : public SchedulerTest {
 protected:
  SpillingSchedulerTest()
      : SchedulerTest(
            {.epoch = Epoch{1}, .num_layers = 4, .max_batched_tokens = 64, .spills = true}) {}

  std::vector<StepEvent> refused(const StepPlan& to) {
    auto results = answers(to);
    for (auto& answer : results[1].admits) {
      answer.error = Error{ErrorCode::kExhausted, "device memory"};
      answer.device_is_full = true;
    }
    return feed(results);
  }
  // Sequence 1 decodes, densely, and will be `length` tokens long.
  void start_first(int length) {
    scheduler_.add(sequence(1, 30, length - 30));
    const auto admission = plan();
    EXPECT_TRUE(admission.admits.at(0).dense);
    feed(answers(admission));
    step();
  }
  // Sequence 2 is admitted at the second try only, when 3 is in its prefill already.
  void begin_third_while_second_is_refused(int second_length) {
    scheduler_.add(sequence(2, second_length, 4));
    scheduler_.add(sequence(3, 300, 4, 50));
    const auto admission = plan();
    auto results = answers(admission);
    results[1].admits.at(0).error = Error{ErrorCode::kExhausted, "device memory"};
    results[1].admits.at(0).device_is_full = true;
    feed(results);
    const auto begin = plan();
    EXPECT_EQ(begin.admits.at(0).sequence, SequenceId{2});
    EXPECT_EQ(begin.prefills.at(0).sequence, SequenceId{3});
    feed(answers(begin));
  }
};

TEST_F(SpillingSchedulerTest, TheLongestDenseSequenceSpillsForANewOne) {
  start_first(130);
  scheduler_.add(sequence(2, 20, 4));
  const auto first_try = plan();
  EXPECT_TRUE(first_try.admits.at(0).dense);
  EXPECT_THAT(only<NotAdmitted>(refused(first_try)), IsEmpty());
  EXPECT_FALSE(scheduler_.is_dense(SequenceId{1}));

  const auto second_try = plan();
  EXPECT_THAT(second_try.spills, ElementsAre(SequenceId{1}));
  EXPECT_THAT(second_try.releases, ElementsAre(SequenceId{2}));  // rank 0 had admitted it
  ASSERT_EQ(second_try.admits.size(), 1U);
  EXPECT_TRUE(second_try.admits[0].dense);
  EXPECT_THAT(second_try.decodes, ElementsAre(SequenceId{1}));
  EXPECT_EQ(only<Admitted>(feed(answers(second_try))).size(), 1U);
  EXPECT_TRUE(scheduler_.is_dense(SequenceId{2}));

  scheduler_.release(SequenceId{1});
  const auto released = only<Released>(step());
  ASSERT_EQ(released.size(), 1U);
  EXPECT_TRUE(released[0].kv.spilled);
}

TEST_F(SpillingSchedulerTest, ANewSequenceThatIsTheLongestSpillsItself) {
  start_first(60);
  scheduler_.add(sequence(2, 100, 4));
  EXPECT_THAT(only<NotAdmitted>(refused(plan())), IsEmpty());
  const auto second_try = plan();
  EXPECT_THAT(second_try.spills, IsEmpty());
  EXPECT_FALSE(second_try.admits.at(0).dense);
  EXPECT_TRUE(scheduler_.is_dense(SequenceId{1}));
  // It doesn't even fit spilled, so that the other one must spill after all.
  EXPECT_THAT(only<NotAdmitted>(refused(second_try)), IsEmpty());
  const auto third_try = plan();
  EXPECT_THAT(third_try.spills, ElementsAre(SequenceId{1}));
  EXPECT_FALSE(third_try.admits.at(0).dense);
  // Nothing is dense any more: it waits for others to end.
  EXPECT_EQ(only<NotAdmitted>(refused(third_try)).size(), 1U);
}

TEST_F(SpillingSchedulerTest, ASecondRefusalWaitsForTheSpillOnItsWay) {
  start_first(130);
  scheduler_.add(sequence(2, 20, 4));
  const auto one = plan();
  scheduler_.add(sequence(3, 25, 4, 50));
  const auto other = plan();
  refused(one);
  const auto spill = plan();
  EXPECT_THAT(spill.spills, ElementsAre(SequenceId{1}));
  refused(other);
  const auto retry = plan();
  EXPECT_THAT(retry.spills, IsEmpty());
  EXPECT_TRUE(retry.admits.at(0).dense);
}

TEST_F(SpillingSchedulerTest, ARefusedSequenceThatIsCancelledIsReleased) {
  start_first(130);
  scheduler_.add(sequence(2, 20, 4));
  refused(plan());
  EXPECT_TRUE(scheduler_.release(SequenceId{2}));
  const auto release = plan();
  EXPECT_THAT(release.releases, ElementsAre(SequenceId{2}));
  EXPECT_THAT(release.admits, IsEmpty());
  EXPECT_EQ(only<Released>(feed(answers(release))).size(), 1U);
}

// A rank holds what lies between the layers of one prompt.
TEST_F(SpillingSchedulerTest, APrefillThatHasBegunEndsBeforeThatOfAnEarlierSequence) {
  start_first(2000);
  begin_third_while_second_is_refused(/*second_length=*/20);
  std::vector<SequenceId> order;
  while (lengths_[SequenceId{2}] == 20) {
    const auto made = plan();
    for (const auto& item : made.prefills) order.push_back(item.sequence);
    feed(answers(made));
  }
  EXPECT_GT(std::ranges::count(order, SequenceId{3}), 1);
  EXPECT_TRUE(std::ranges::is_sorted(order, std::greater<>())) << "3 ends, then 2 begins";
}

TEST_F(SpillingSchedulerTest, APrefillThatHasBegunGoesOnBesideTheStartOfAnEarlierSequence) {
  start_first(2000);
  begin_third_while_second_is_refused(/*second_length=*/900);
  const auto start = plan();
  EXPECT_EQ(start.starts.at(0).sequence, SequenceId{2});
  ASSERT_EQ(start.prefills.size(), 1U);
  EXPECT_EQ(start.prefills[0].sequence, SequenceId{3});
}

TEST_F(SpillingSchedulerTest, AFullStoreSpillsNothing) {
  start_first(130);
  scheduler_.add(sequence(2, 20, 4));
  const auto admission = plan();
  auto results = answers(admission);
  results[0].admits[0].error = Error{ErrorCode::kExhausted, "no slabs"};
  results[1].admits[0].error = Error{ErrorCode::kExhausted, "device memory"};
  results[1].admits[0].device_is_full = true;
  EXPECT_EQ(only<NotAdmitted>(feed(results)).size(), 1U);
  EXPECT_TRUE(scheduler_.is_dense(SequenceId{1}));
}

}  // namespace
}  // namespace foretoken::coordinator
