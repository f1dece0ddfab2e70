#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

#include "worker/bench.h"

namespace foretoken::worker {
namespace {

void parse(const std::string& words) {
  CLI::App app;
  std::function<void()> action;
  add_bench_commands(app, action);
  app.parse(words);
}

// More ends the process in mid-measurement on a GPU.
TEST(BenchCommand, TakesContextsThatTheGpusPredictorTakes) {
  EXPECT_NO_THROW(parse("bench predictor --model m --context 256,1048576"));
  EXPECT_THROW(parse("bench predictor --model m --context 256,1048577"), CLI::ValidationError);
}

}  // namespace
}  // namespace foretoken::worker
