// What `foretoken bench decode|prefill` says of what it measured. Pure functions.
// Example: tests/launch/bench_test.py
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "launch/internal/bench_load.h"
#include "launch/internal/svg_plot.h"

namespace foretoken::launch {

// What was measured of one service.
struct Measured {
  StatusReply status;
  std::vector<Batch> batches;
  const DoneMessage& last() const { return batches.back().runs.back().done; }
};

// {"bench", "model", "machine", "device", ..., "kv"}; a decode's also has
//   ms_per_token    as the client saw them; those of one message share its wait
//   worker_step_ms  median of what the steps took on the slowest rank
//   churn           share of the chosen blocks that were not there yet
//   device_share    of the context's whole KV: what the sequence takes on the device
nlohmann::ordered_json figures(const std::string& kind, const BenchLoad& load,
                               const Measured& measured);
// The same of another service.
//   ratio         the main one's median over its own
//   equal_tokens  the last answer's first ones that are the main one's
nlohmann::ordered_json baseline_figures(const std::string& name, const Measured& measured,
                                        const Measured& main);

// The time to each token of the first request of each service's last batch.
Plot plot_of(const nlohmann::ordered_json& main,
             const std::vector<std::pair<std::string, Measured>>& services);

void print_for_people(const nlohmann::ordered_json& json);

}  // namespace foretoken::launch
