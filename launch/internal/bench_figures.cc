#include "launch/internal/bench_figures.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>

#include "launch/internal/machine.h"
#include "launch/internal/report.h"

namespace foretoken::launch {
namespace {

using Json = nlohmann::ordered_json;

double mean_of(const std::vector<double>& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Nearest rank.
double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(
      std::lround(share * static_cast<double>(values.size() - 1)))];
}

Json prefill_figures(const std::vector<Batch>& batches) {
  std::vector<double> rates;
  for (const Batch& batch : batches) {
    for (const Run& run : batch.runs) {
      const auto computed = run.done.usage.prompt_tokens - run.done.usage.cached_tokens;
      rates.push_back(1000.0 * static_cast<double>(computed) / run.done.timing.prefill_ms);
    }
  }
  return {{"mean", mean_of(rates)}, {"median", percentile(rates, 0.5)}};
}

Json decode_figures(const std::vector<Batch>& batches) {
  std::vector<double> ms;
  for (const Batch& batch : batches) {
    ms.insert(ms.end(), batch.token_ms.begin(), batch.token_ms.end());
  }
  return {{"mean", mean_of(ms)},
          {"median", percentile(ms, 0.5)},
          {"p95", percentile(ms, 0.95)},
          {"min", percentile(ms, 0)},
          {"max", percentile(ms, 1)}};
}

double decode_rate(const std::vector<Batch>& batches) {
  std::vector<double> rates;
  rates.reserve(batches.size());
  for (const Batch& batch : batches) rates.push_back(batch.tokens_per_s);
  return mean_of(rates);
}

// Of each request the median step, and of those the median.
double worker_step_ms(const std::vector<Batch>& batches) {
  std::vector<double> steps;
  for (const Batch& batch : batches) {
    for (const Run& run : batch.runs) steps.push_back(run.done.timing.step_ms);
  }
  return percentile(steps, 0.5);
}

Json share(std::int64_t part, std::int64_t whole) {
  if (whole <= 0) return nullptr;
  return static_cast<double>(part) / static_cast<double>(whole);
}

void add_decode_figures(const Measured& measured, Json& json) {
  const KvReport& kv = measured.last().kv;
  json["ms_per_token"] = decode_figures(measured.batches);
  json["worker_step_ms"] = worker_step_ms(measured.batches);
  json["tokens_per_s"] = decode_rate(measured.batches);
  json["churn"] = share(kv.blocks_fetched, kv.blocks_predicted);
  json["device_share"] = share(kv.device_bytes, kv.full_kv_bytes);
  json["late"] = kv.late;
  json["nvme_bytes"] = kv.bytes_nvme;
}

void print_decode(const Json& json, const std::string& name) {
  const Json& ms = json["ms_per_token"];
  std::cout << "  " << name << " " << json["tokens_per_s"] << " tokens/s; ms a token: mean "
            << ms["mean"] << ", median " << ms["median"] << " (the worker's step "
            << json["worker_step_ms"] << "), p95 " << ms["p95"] << "; new blocks " << json["churn"]
            << ", of the KV on the device " << json["device_share"] << "\n";
}

}  // namespace

Json figures(const std::string& kind, const BenchLoad& load, const Measured& measured) {
  const DoneMessage& last = measured.last();
  Json json = {{"bench", kind},
               {"model", measured.status.model},
               {"machine", machine_name()},
               {"device", measured.status.device},
               {"tensor_parallel_size", measured.status.tensor_parallel_size},
               {"policy", last.kv.policy},
               {"budget_tokens", last.kv.budget_tokens},
               {"context_tokens", last.usage.prompt_tokens},
               {"generated_tokens", last.usage.completion_tokens},
               {"batch", load.batch},
               {"repeat", load.repeat},
               {"prefill_tokens_per_s", prefill_figures(measured.batches)}};
  if (kind == "decode") add_decode_figures(measured, json);
  json["kv"] = to_json(last.kv);
  return json;
}

Json baseline_figures(const std::string& name, const Measured& measured, const Measured& main) {
  Json json = {{"baseline", name}, {"generated_tokens", measured.last().usage.completion_tokens}};
  add_decode_figures(measured, json);
  json["ratio"] = decode_figures(main.batches)["median"].get<double>() /
                  json["ms_per_token"]["median"].get<double>();
  const std::vector<TokenInfo>& tokens = measured.last().tokens;
  const auto differ =
      std::ranges::mismatch(tokens, main.last().tokens, {}, &TokenInfo::id, &TokenInfo::id);
  json["equal_tokens"] = differ.in1 - tokens.begin();
  json["kv"] = to_json(measured.last().kv);
  return json;
}

Plot plot_of(const Json& json, const std::vector<std::pair<std::string, Measured>>& services) {
  Plot plot{.title = "bench decode, " + json["device"].get<std::string>() + ", context " +
                     json["context_tokens"].dump(),
            .x_label = "token",
            .y_label = "ms",
            .series = {}};
  for (const auto& [name, measured] : services) {
    const Batch& batch = measured.batches.back();
    const std::size_t count = batch.token_ms.size() / batch.runs.size();
    Plot::Series series{name, {}};
    for (std::size_t i = 0; i < count; ++i) {
      series.points.emplace_back(static_cast<double>(i + 1), batch.token_ms[i]);
    }
    plot.series.push_back(std::move(series));
  }
  return plot;
}

void print_for_people(const Json& json) {
  std::cout << json["bench"].get<std::string>() << " of " << json["model"].get<std::string>()
            << ", " << json["policy"].get<std::string>() << ", context " << json["context_tokens"]
            << "\n";
  std::cout << "  prefill " << json["prefill_tokens_per_s"]["mean"] << " tokens/s\n";
  if (!json.contains("ms_per_token")) return;
  print_decode(json, "decode ");
  for (const Json& baseline : json["baselines"]) {
    if (baseline.contains("error")) continue;
    print_decode(baseline, baseline["baseline"].get<std::string>());
    std::cout << "    decode takes " << baseline["ratio"] << " times as long; the first "
              << baseline["equal_tokens"] << " tokens of the last answer are equal\n";
  }
}

}  // namespace foretoken::launch
