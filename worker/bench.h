// What `foretoken bench gather` and `bench predictor` measure: single ops of a decode step, on the
// device itself, without a service. Each function returns one JSON object in one line, and throws
// Exception. Example: tests/worker/bench_command_test.cc
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/service_config.h"

namespace CLI {
class App;
}

namespace foretoken::worker {

// Where to measure. Of the service's settings those count that say so.
struct BenchOptions {
  ServiceConfig service;  // model (its shape alone), device, threads_per_rank
};

// The gather of a step's new blocks, alone and beside the products of a decode step:
//   {"bench", "device", "gather_units", "link_gb_per_s", "context_tokens", "budget_tokens",
//    "rows": [{"block_bytes", "churn_percent", "blocks", "ms", "gb_per_s", "link_share",
//              "dense_ms", "dense_beside_ms", "dense_slow_down", "step_ms"}]}
// blocks, ms: a step's. dense_ms: the products alone; dense_beside_ms: while gathers run without a
// pause; step_ms: with one step's gather beside them, to the end of both. link_gb_per_s: of a plain
// copy from the same memory. Takes as much host memory as the context has KV.
struct GatherBenchOptions : BenchOptions {
  int context = 131072;                         // tokens, where a block has the model's size
  int budget = 2304;                            // tokens a KV head
  std::vector<double> churn = {2, 8, 20, 100};  // % of the critical blocks that are new
  std::vector<int> block_kib;                   // empty: the model's
};
std::string bench_gather(const GatherBenchOptions& options);

// The predictor of a decode step, all layers, by one map a KV head and one a query head, with bf16
// and 8-bit history:
//   {"bench", "device", "batch", "budget_tokens", "rows": [{"context_tokens", "hot_percent",
//    "predict_per", "history_type", "maps", "predict_ms", "append_ms"}]}
// predict_ms: from the step's rows to the blocks chosen, top-k included; append_ms: the rows into
// the histories. hot_percent: of the segments of the CNN's input, those that need the whole network
// (docs/predictor.md); attention is made up so that they are as many.
struct PredictorBenchOptions : BenchOptions {
  std::vector<int> context = {8192, 32768, 131072};  // tokens
  std::vector<double> hot = {0, 12, 100};            // %
  int budget = 1024;                                 // tokens a map
  int batch = 1;                                     // sequences
};
std::string bench_predictor(const PredictorBenchOptions& options);

// Adds `bench gather` and `bench predictor` to a command line. The one that was given is put into
// *action, which prints what its function above returns.
void add_bench_commands(CLI::App& app, std::function<void()>& action);

}  // namespace foretoken::worker
