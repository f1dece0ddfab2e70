#include "tests/coordinator/simulation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "common/log.h"

namespace foretoken::coordinator {
namespace {

struct Totals {
  int done = 0;
  int failed = 0;
  int deaths = 0;
};

// FORETOKEN_SIMULATION_FACTOR=100 plays a hundred times as many games, 0.2 a fifth of them.
int games(int usual) {
  const char* text = std::getenv("FORETOKEN_SIMULATION_FACTOR");
  return text != nullptr ? std::max(1, static_cast<int>(usual * std::atof(text))) : usual;
}

// Seeds first, first + 1, ...; each prints itself when something breaks.
Totals play(SimulationConfig config, std::uint64_t first, int count) {
  Totals totals;
  for (int i = 0; i < count; ++i) {
    config.seed = first + static_cast<std::uint64_t>(i);
    SCOPED_TRACE("seed " + std::to_string(config.seed));
    Simulation simulation(config);
    simulation.run();
    totals.done += simulation.num_done();
    totals.failed += simulation.num_failed();
    totals.deaths += simulation.num_deaths();
    if (::testing::Test::HasFailure()) break;
  }
  return totals;
}

class SimulationTest : public ::testing::Test {
 protected:
  SimulationTest() { log().set_level(spdlog::level::off); }
  ~SimulationTest() override { log().set_level(spdlog::level::info); }
};

TEST_F(SimulationTest, WithoutFaultsEveryRequestGetsItsTokens) {
  const auto totals = play({.num_requests = 100}, 1, games(20));
  EXPECT_EQ(totals.done, 100 * games(20));
  EXPECT_EQ(totals.failed, 0);
  EXPECT_EQ(totals.deaths, 0);
}

TEST_F(SimulationTest, DenseServiceReusesWhatItGenerated) {
  EXPECT_EQ(play({.num_requests = 100, .kv_policy = "full"}, 1'000'000, games(10)).done,
            100 * games(10));
}

TEST_F(SimulationTest, SeveralGroupsShareTheWork) {
  EXPECT_EQ(
      play({.num_requests = 100, .num_groups = 3, .world_size = 1}, 2'000'000, games(10)).done,
      100 * games(10));
}

TEST_F(SimulationTest, PrefillCutToABoundOnStepsLosesNothing) {
  EXPECT_EQ(play({.num_requests = 100, .max_inter_token_ms = 2}, 8'000'000, games(10)).done,
            100 * games(10));
}

TEST_F(SimulationTest, ScarceRoomDelaysButNothingFails) {
  EXPECT_EQ(play({.num_requests = 50, .slabs = 6, .start_faults = 300}, 3'000'000, games(10)).done,
            50 * games(10));
}

TEST_F(SimulationTest, AFullDeviceSpillsButNothingFails) {
  EXPECT_EQ(
      play({.num_requests = 100, .kv_policy = "auto", .device_tokens = 1500}, 9'000'000, games(10))
          .done,
      100 * games(10));
}

TEST_F(SimulationTest, AFullDeviceSpillsWhilePrefillIsCutToABoundOnSteps) {
  EXPECT_EQ(play({.num_requests = 100,
                  .kv_policy = "auto",
                  .max_inter_token_ms = 2,
                  .device_tokens = 1500},
                 11'000'000, games(10))
                .done,
            100 * games(10));
}

TEST_F(SimulationTest, DisturbingClientsDisturbNobodyElse) {
  const auto totals = play({.num_requests = 100, .client_faults = 5000}, 4'000'000, games(25));
  EXPECT_GT(totals.done, 80 * games(25));
}

TEST_F(SimulationTest, DyingGroupsLoseAndDoubleNoToken) {
  const auto totals = play({.num_requests = 100, .rank_faults = 4000}, 5'000'000, games(25));
  EXPECT_GT(totals.deaths, 4 * games(25));
  EXPECT_GT(totals.done, 80 * games(25));
}

TEST_F(SimulationTest, EverythingAtOnce) {
  const auto totals = play({.num_requests = 100,
                            .num_groups = 2,
                            .kv_policy = "full",
                            .slabs = 12,
                            .max_inter_token_ms = 2,
                            .rank_faults = 4000,
                            .client_faults = 3000},
                           6'000'000, games(25));
  EXPECT_GT(totals.deaths, 2 * games(25));
  EXPECT_GT(totals.done, 60 * games(25));
}

TEST_F(SimulationTest, TheSameSeedPlaysTheSameGame) {
  const SimulationConfig config{
      .seed = 700, .num_requests = 60, .rank_faults = 4000, .client_faults = 3000};
  Simulation first(config);
  first.run();
  Simulation second(config);
  second.run();
  EXPECT_EQ(first.num_done(), second.num_done());
  EXPECT_EQ(first.fingerprint(), second.fingerprint());
}

TEST_F(SimulationTest, EverythingAtOnceWhileSequencesSpill) {
  const auto totals = play({.num_requests = 100,
                            .kv_policy = "auto",
                            .slabs = 12,
                            .device_tokens = 1500,
                            .rank_faults = 4000,
                            .client_faults = 3000,
                            .start_faults = 300},
                           10'000'000, games(25));
  EXPECT_GT(totals.deaths, 2 * games(25));
  EXPECT_GT(totals.done, 60 * games(25));
}

}  // namespace
}  // namespace foretoken::coordinator
