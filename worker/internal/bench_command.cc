#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "common/ids.h"
#include "kernels/predict_limits.h"
#include "worker/bench.h"

namespace foretoken::worker {
namespace {

void add_device_flags(CLI::App& app, BenchOptions& options) {
  app.add_option("--model", options.service.model, "model folder: its shape, with random weights")
      ->required();
  app.add_option("--device", options.service.device, "auto, cuda or cpu")
      ->check(CLI::IsMember({"auto", "cuda", "cpu"}));
  app.add_option("--threads", options.service.threads_per_rank, "CPU device: threads; 0: all")
      ->check(CLI::Range(0, 1024));
}

void add_gather(CLI::App& bench, std::function<void()>& action) {
  CLI::App* app = bench.add_subcommand("gather", "new blocks from host memory, as a step needs");
  auto options = std::make_shared<GatherBenchOptions>();
  add_device_flags(*app, *options);
  app->add_option("--context", options->context, "tokens")->check(CLI::Range(256, 1 << 24));
  app->add_option("--budget", options->budget, "tokens a KV head")->check(CLI::Range(144, 1 << 24));
  app->add_option("--churn", options->churn, "% of critical blocks that are new, as 2,8")
      ->delimiter(',')
      ->check(CLI::Range(0.1, 100.0));
  app->add_option("--block-kib", options->block_kib, "sizes of a block, as 4,8 (the model's)")
      ->delimiter(',')
      ->check(CLI::Range(1, 64));
  app->callback([options, &action] {
    action = [options] { std::cout << bench_gather(*options) << std::endl; };
  });
}

void add_predictor(CLI::App& bench, std::function<void()>& action) {
  CLI::App* app = bench.add_subcommand("predictor", "the predictor of a step, with its top-k");
  auto options = std::make_shared<PredictorBenchOptions>();
  add_device_flags(*app, *options);
  app->add_option("--context", options->context, "tokens, as 8192,32768")
      ->delimiter(',')
      ->check(CLI::Range(256, kernels::kMaxPredictColumns * kBlockTokens));
  app->add_option("--hot", options->hot, "% of segments that need the whole network, as 0,12")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 100.0));
  app->add_option("--budget", options->budget, "tokens a map")->check(CLI::Range(144, 1 << 24));
  app->add_option("--batch", options->batch, "sequences")->check(CLI::Range(1, 1024));
  app->callback([options, &action] {
    action = [options] { std::cout << bench_predictor(*options) << std::endl; };
  });
}

}  // namespace

void add_bench_commands(CLI::App& app, std::function<void()>& action) {
  CLI::App* bench = app.add_subcommand("bench", "time ops of a decode step, print JSON, and end");
  bench->require_subcommand(1);
  add_gather(*bench, action);
  add_predictor(*bench, action);
}

}  // namespace foretoken::worker
