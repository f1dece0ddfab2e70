#include "coordinator/worker_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/log.h"

namespace foretoken::coordinator {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

class WorkerGroupTest : public ::testing::Test {
 protected:
  WorkerGroupTest() { log().set_level(spdlog::level::off); }
  ~WorkerGroupTest() override { log().set_level(spdlog::level::info); }

  static std::string peer(int rank) { return "peer" + std::to_string(rank); }
  std::vector<GroupEvent> hello(int rank, int world_size = 2, int life = 0) {
    return group_.on_hello(peer(rank), {0, rank, world_size, 100 + rank, "here", life});
  }
  std::vector<GroupEvent> ready(int rank, Epoch epoch = Epoch{1}, std::string hash = "m") {
    Ready message;
    message.epoch = epoch;
    message.rank = rank;
    message.model_hash = std::move(hash);
    message.max_model_len = 1000 + rank;
    return group_.on_ready(peer(rank), message);
  }
  std::vector<GroupEvent> result(int rank, int step, Epoch epoch = Epoch{1}) {
    StepResult message;
    message.epoch = epoch;
    message.rank = rank;
    message.step = StepNumber(step);
    return group_.on_result(peer(rank), message);
  }
  void beat(int rank, Epoch epoch = Epoch{1}) { group_.on_heartbeat({epoch, 0, rank}); }
  void assemble() {
    hello(0);
    hello(1);
    ready(0);
    ready(1);
    ASSERT_TRUE(group_.is_ready());
  }
  // Time passes in steps that are short enough not to count as our own sleep.
  std::vector<GroupEvent> pass(milliseconds time) {
    std::vector<GroupEvent> events;
    for (; time.count() > 0; time -= milliseconds(100)) {
      now_ += milliseconds(100);
      for (auto& event : group_.on_time(now_)) events.push_back(std::move(event));
    }
    return events;
  }
  template <typename T>
  static const T* find(const std::vector<GroupEvent>& events) {
    for (const auto& event : events) {
      if (const auto* found = std::get_if<T>(&event)) return found;
    }
    return nullptr;
  }

  WorkerGroup group_{0, 2};
  TimePoint now_{};
};

TEST_F(WorkerGroupTest, IsReadyWhenAllRanksAre) {
  EXPECT_EQ(find<SendWelcome>(hello(0))->peer, "peer0");
  EXPECT_EQ(group_.describe(), "1 of 2 ranks have joined");
  EXPECT_FALSE(group_.is_assembled());
  hello(1);
  EXPECT_TRUE(group_.is_assembled());
  EXPECT_TRUE(ready(1).empty());
  EXPECT_EQ(group_.describe(), "1 of 2 ranks have loaded the model");
  EXPECT_NE(find<GroupReady>(ready(0)), nullptr);
  EXPECT_EQ(group_.context(), 1000);
  EXPECT_EQ(group_.peers(), (std::vector<std::string>{"peer0", "peer1"}));
}

TEST_F(WorkerGroupTest, RefusesRanksOfAnotherShape) {
  EXPECT_TRUE(hello(0, 3).empty());
  EXPECT_TRUE(hello(2, 2).empty());
  EXPECT_TRUE(hello(-1, 2).empty());
  EXPECT_TRUE(group_.peers().empty());
}

TEST_F(WorkerGroupTest, RanksOfDifferentModelsAreNoGroup) {
  hello(0);
  hello(1);
  ready(0);
  const auto events = ready(1, Epoch{1}, "other");
  const auto* dead = find<GroupDead>(events);
  ASSERT_NE(dead, nullptr);
  EXPECT_EQ(dead->error.code, ErrorCode::kModelFile);
}

TEST_F(WorkerGroupTest, AStepIsDoneWhenAllRanksAnswered) {
  assemble();
  group_.on_plan_sent(StepNumber{1});
  group_.on_plan_sent(StepNumber{2});
  EXPECT_TRUE(result(1, 1).empty());
  EXPECT_TRUE(result(1, 2).empty());
  const auto first = result(0, 1);
  const auto* done = find<StepDone>(first);
  ASSERT_NE(done, nullptr);
  ASSERT_EQ(done->ranks.size(), 2U);
  EXPECT_EQ(done->ranks[0].rank, 0);
  EXPECT_EQ(done->ranks[1].rank, 1);
  EXPECT_NE(find<StepDone>(result(0, 2)), nullptr);
}

// Each rank counts the store's slabs when its own part of a step is done.
TEST_F(WorkerGroupTest, TheLastCountOfSlabsHolds) {
  assemble();
  const auto answer = [&](int rank, int step, std::int64_t free, bool admits) {
    StepResult message;
    message.epoch = Epoch{1};
    message.rank = rank;
    message.step = StepNumber(step);
    message.kv_slabs = KvSlabs{.free = free, .cached = 0, .ready = 10};
    if (admits) message.admits = {{SequenceId{1}, 0, std::nullopt}};
    group_.on_result(peer(rank), message);
  };
  group_.on_plan_sent(StepNumber{1});
  answer(1, 1, 6, /*admits=*/true);
  answer(0, 1, 8, /*admits=*/true);
  EXPECT_EQ(group_.kv_slabs().free, 6) << "both ranks have reserved by then";
  group_.on_plan_sent(StepNumber{2});
  answer(0, 2, 10, /*admits=*/false);
  answer(1, 2, 8, /*admits=*/false);
  EXPECT_EQ(group_.kv_slabs().free, 10) << "both ranks have released by then";
}

TEST_F(WorkerGroupTest, AnAnswerThatNobodyAskedForIsDeath) {
  assemble();
  EXPECT_TRUE(find<GroupDead>(result(0, 1))->must_be_killed);
  group_.on_plan_sent(StepNumber{1});
  result(0, 1);
  EXPECT_NE(find<GroupDead>(result(0, 1)), nullptr);
}

TEST_F(WorkerGroupTest, SilenceIsSuspectedThenFenced) {
  assemble();
  EXPECT_TRUE(pass(milliseconds(900)).empty());
  beat(0);
  const auto suspected = pass(milliseconds(200));
  ASSERT_NE(find<SendWelcome>(suspected), nullptr);
  EXPECT_EQ(find<SendWelcome>(suspected)->peer, "peer1");
  beat(1);
  beat(0);
  EXPECT_TRUE(pass(milliseconds(900)).empty());  // it was a short stop
  EXPECT_EQ(find<GroupDead>(pass(milliseconds(2000))), nullptr);
  const auto fenced = pass(milliseconds(200));
  ASSERT_NE(find<GroupDead>(fenced), nullptr);
  EXPECT_TRUE(find<GroupDead>(fenced)->must_be_killed);
  EXPECT_THAT(find<GroupDead>(fenced)->error.message, HasSubstr("pid 100 on here"));
}

TEST_F(WorkerGroupTest, KnowsTheHeartbeatsOfItsOwnRanks) {
  const auto knows = [this](int rank, Epoch epoch) {
    return group_.on_heartbeat({epoch, 0, rank});
  };
  EXPECT_FALSE(knows(0, Epoch{1}));  // it has not said hello
  assemble();
  EXPECT_TRUE(knows(0, Epoch{1}));
  EXPECT_FALSE(knows(2, Epoch{1}));
  EXPECT_FALSE(knows(0, Epoch{2}));
  group_.begin_epoch(Epoch{2});
  EXPECT_FALSE(knows(0, Epoch{1}));
}

TEST_F(WorkerGroupTest, ARankWhoseConnectionIsClosedIsNamed) {
  assemble();
  const GroupDead dead = group_.on_unsent(peer(1), {ErrorCode::kNotFound, "the peer is gone"});
  EXPECT_THAT(dead.error.message, HasSubstr("rank 1 (pid 101 on here) of group 0 is gone"));
  EXPECT_FALSE(dead.must_be_killed);
}

// Nobody else would end it: it lives.
TEST_F(WorkerGroupTest, ARankThatTakesNoMessagesIsSaidToAndMustBeKilled) {
  assemble();
  const GroupDead dead =
      group_.on_unsent(peer(1), {ErrorCode::kExhausted, "the peer's queue is full"});
  EXPECT_THAT(dead.error.message,
              HasSubstr("rank 1 (pid 101 on here) of group 0 can't be sent to: the peer's queue"));
  EXPECT_TRUE(dead.must_be_killed);
}

TEST_F(WorkerGroupTest, ARankThatJoinedHasLongerForItsFirstHeartbeat) {
  hello(0);
  EXPECT_TRUE(pass(milliseconds(7500)).empty());
  EXPECT_NE(find<GroupDead>(pass(milliseconds(3000))), nullptr);
}

TEST_F(WorkerGroupTest, OurOwnSleepIsNobodysSilence) {
  assemble();
  pass(milliseconds(200));
  group_.on_plan_sent(StepNumber{1});
  now_ += std::chrono::hours(1);
  EXPECT_TRUE(group_.on_time(now_).empty());
  EXPECT_EQ(find<GroupDead>(pass(milliseconds(2500))), nullptr);
  EXPECT_NE(find<GroupDead>(pass(milliseconds(600))), nullptr);
}

// At a load of many times its cores the coordinator, at nice 10, comes to look every second or so;
// what ranks sent waits in its sockets until then.
TEST_F(WorkerGroupTest, AStarvedCoordinatorFencesNobody) {
  assemble();
  pass(milliseconds(200));
  for (int look = 0; look < 4; ++look) {
    now_ += milliseconds(900);
    EXPECT_EQ(find<GroupDead>(group_.on_time(now_)), nullptr) << look;
  }
  beat(0);
  beat(1);
  EXPECT_EQ(find<GroupDead>(pass(milliseconds(2900))), nullptr);
  EXPECT_NE(find<GroupDead>(pass(milliseconds(200))), nullptr);
}

TEST_F(WorkerGroupTest, AStepThatNeverEndsIsFenced) {
  assemble();
  group_.on_plan_sent(StepNumber{1});
  for (int i = 0; i < 133; ++i) {
    beat(0);
    beat(1);
    EXPECT_TRUE(pass(milliseconds(900)).empty());
  }
  beat(0);
  beat(1);
  const auto events = pass(milliseconds(900));
  ASSERT_NE(find<GroupDead>(events), nullptr);
  EXPECT_EQ(find<GroupDead>(events)->error.code, ErrorCode::kTimeout);
}

// The next plan is out already while a step runs; its own time begins when that step is done.
TEST_F(WorkerGroupTest, LongStepsAreNotAddedUp) {
  assemble();
  group_.on_plan_sent(StepNumber{1});
  for (int step = 1; step < 6; ++step) {
    group_.on_plan_sent(StepNumber(step + 1));
    for (int i = 0; i < 100; ++i) {
      beat(0);
      beat(1);
      ASSERT_TRUE(pass(milliseconds(900)).empty()) << step;
    }
    result(0, step);
    EXPECT_NE(find<StepDone>(result(1, step)), nullptr) << step;
  }
}

TEST_F(WorkerGroupTest, MessagesOfAnotherEpochOrPeerAreDropped) {
  assemble();
  group_.on_plan_sent(StepNumber{1});
  EXPECT_TRUE(result(0, 1, Epoch{2}).empty());
  StepResult strange;
  strange.epoch = Epoch{1};
  strange.step = StepNumber{1};
  EXPECT_TRUE(group_.on_result("stranger", strange).empty());
  EXPECT_TRUE(group_.on_failed("stranger", {Epoch{1}, 0, 0, {}}).empty());
  EXPECT_TRUE(group_.on_failed("peer0", {Epoch{7}, 0, 0, {}}).empty());
  beat(99);
  pass(milliseconds(500));
  group_.begin_epoch(Epoch{2});
  EXPECT_FALSE(group_.is_ready());
  EXPECT_TRUE(ready(0, Epoch{1}).empty());
  EXPECT_TRUE(result(0, 1, Epoch{1}).empty());
  EXPECT_TRUE(group_.on_failed("peer0", {Epoch{1}, 0, 0, {}}).empty());
}

TEST_F(WorkerGroupTest, AFailureIsDeathWithItsReason) {
  assemble();
  const auto events =
      group_.on_failed("peer1", {Epoch{1}, 0, 1, {ErrorCode::kDevice, "out of memory"}});
  const auto* dead = find<GroupDead>(events);
  ASSERT_NE(dead, nullptr);
  EXPECT_EQ(dead->error.code, ErrorCode::kDevice);
  EXPECT_THAT(dead->error.message, HasSubstr("out of memory"));
  EXPECT_FALSE(dead->must_be_killed);  // it ends by itself
}

TEST_F(WorkerGroupTest, AHelloToAReadyGroupIsItsDeath) {
  assemble();
  const auto events = hello(1);
  const auto* dead = find<GroupDead>(events);
  ASSERT_NE(dead, nullptr);
  EXPECT_FALSE(dead->must_be_killed);
  group_.begin_epoch(Epoch{2});
  EXPECT_NE(find<SendWelcome>(hello(1)), nullptr);
}

TEST_F(WorkerGroupTest, RanksOfTheNewestLifeAreTheGroup) {
  EXPECT_EQ(group_.life(), std::nullopt);
  EXPECT_NE(find<SendWelcome>(hello(0, 2, /*life=*/3)), nullptr);
  EXPECT_NE(find<GroupDead>(hello(1, 2, /*life=*/4)), nullptr);  // lives share no epoch
  EXPECT_EQ(group_.life(), 3);                                   // whose death it is
  group_.begin_epoch(Epoch{2});
  EXPECT_NE(find<SendWelcome>(hello(1, 2, /*life=*/4)), nullptr);
  EXPECT_TRUE(hello(0, 2, /*life=*/3).empty());
  EXPECT_EQ(group_.peers(), std::vector<std::string>{"peer1"});
  EXPECT_EQ(group_.life(), 4);
  EXPECT_NE(find<SendWelcome>(hello(0, 2, /*life=*/4)), nullptr);
  ready(0, Epoch{2});
  ready(1, Epoch{2});
  ASSERT_TRUE(group_.is_ready());
  EXPECT_TRUE(hello(1, 2, /*life=*/3).empty());
  EXPECT_NE(find<GroupDead>(hello(1, 2, /*life=*/5)), nullptr);
  EXPECT_EQ(group_.life(), 4);  // whose death it is
}

TEST_F(WorkerGroupTest, ALateRankOfADeadLifeBeginsNoGroup) {
  hello(0, 2, /*life=*/3);
  group_.begin_epoch(Epoch{2});
  EXPECT_TRUE(hello(1, 2, /*life=*/3).empty());
  EXPECT_TRUE(hello(1, 2, /*life=*/2).empty());
  EXPECT_EQ(group_.life(), std::nullopt);
  group_.begin_epoch(Epoch{3});  // one of which nobody had come
  EXPECT_TRUE(hello(1, 2, /*life=*/3).empty());
  EXPECT_NE(find<SendWelcome>(hello(1, 2, /*life=*/4)), nullptr);
}

TEST_F(WorkerGroupTest, LivesThatNobodyCountsAreNeverRefused) {
  hello(0, 2, /*life=*/3);
  for (int epoch = 2; epoch < 5; ++epoch) {
    group_.begin_epoch(Epoch(epoch));
    EXPECT_NE(find<SendWelcome>(hello(0)), nullptr) << epoch;
  }
}

TEST_F(WorkerGroupTest, ARankThatComesAgainWhileLoadingTakesItsPlace) {
  hello(0);
  hello(1);
  ready(0);
  EXPECT_NE(find<SendWelcome>(group_.on_hello("new0", {0, 0, 2, 7, "here"})), nullptr);
  EXPECT_TRUE(ready(1).empty());  // rank 0 must load again
  EXPECT_EQ(group_.peers().front(), "new0");
}

}  // namespace
}  // namespace foretoken::coordinator
