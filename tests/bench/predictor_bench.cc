// Time of the predictor a decode step: all maps of a model, rows appended and blocks chosen.
//
//   predictor_bench --layers 30 --heads 3 --columns 478 --threads 2 [--json]
//
// Attention is synthetic: a softmax of persistent heavy-tailed block logits with a slow drift. The
// time depends on how peaked it is. The defaults are as hot as SmolLM2 is at 7,000 tokens of a
// licence text (its share of 5 x 8 neighbourhoods below 6.2e-4, 3.3e-3: .61, .81; here .57, .80).
// --masked keeps only the chosen blocks in four of five rows, as between calibrations.
#include <time.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "predictor/policy.h"

namespace {

using namespace foretoken;
using Clock = std::chrono::steady_clock;

struct Options {
  int layers = 30;
  int heads = 3;  // maps a layer
  int columns = 478;
  int threads = 0;
  int steps = 60;
  int budget_tokens = 1024;
  double spread = 4.0;  // sigma of the block logits
  double mass = 0.1;    // sum of a row; the rest is the sink's, or not a block's maximum
  std::string history = "bf16";
  bool masked = false;
  bool json = false;
};

// Log probabilities of blocks, drifting from step to step.
class Attention {
 public:
  Attention(int maps, const Options& o)
      : maps_(maps),
        columns_(o.columns),
        spread_(o.spread),
        mass_(o.mass),
        base_(size()),
        drift_(size()) {
    for (double& x : base_) x = normal_(random_);
    for (double& x : drift_) x = normal_(random_);
  }

  // out [maps, columns]: logits' maxima against an LSE of 0.
  void next(std::vector<float>* out) {
    out->resize(size());
    for (int m = 0; m < maps_; ++m) {
      double sum = 0;
      float* row = out->data() + m * columns_;
      for (int c = 0; c < columns_; ++c) {
        const std::size_t i = static_cast<std::size_t>(m * columns_ + c);
        drift_[i] = 0.95 * drift_[i] + 0.3122 * normal_(random_);
        const double from_end = columns_ - 1 - c;
        const double logit =
            spread_ * (0.75 * base_[i] + 0.5 * drift_[i] + 0.43 * normal_(random_)) +
            3 * std::exp(-from_end / 8) + 0.5 * std::exp(-from_end / 200);
        row[c] = static_cast<float>(logit);
        sum += std::exp(logit);
      }
      const float lse = static_cast<float>(std::log(sum / mass_));
      for (int c = 0; c < columns_; ++c) row[c] -= lse;
    }
  }

 private:
  std::size_t size() const { return static_cast<std::size_t>(maps_ * columns_); }
  int maps_;
  int columns_;
  double spread_;
  double mass_;
  std::vector<double> base_;
  std::vector<double> drift_;
  std::mt19937 random_{1};
  std::normal_distribution<double> normal_;
};

struct Times {
  std::vector<double> append_ms;
  std::vector<double> select_ms;
  std::vector<double> select_cpu_ms;  // of the calling thread: all of it where there is one
  double first_select_ms = 0;         // sums of 60 rows from nothing
};

// The quickest step says what the code costs where neighbours take the processor's time.
double quickest(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

double thread_cpu_ms() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

kernels::HistoryType history_type(const std::string& name) {
  if (name == "fp32") return kernels::HistoryType::kFp32;
  return name == "bf16" ? kernels::HistoryType::kBf16 : kernels::HistoryType::kE5m3;
}

// Blocks that no map of the layer chose get no value.
void mask(const kernels::Selection& selection, int layer, const Options& o,
          std::vector<float>* row) {
  for (int h = 0; h < o.heads; ++h) {
    const int head = layer * o.heads + h;
    const std::int32_t* chosen = selection.blocks + head * selection.max_selected;
    const std::int32_t* end = chosen + selection.counts[head];
    float* values = row->data() + h * o.columns;
    for (int c = 4; c < o.columns - 4; ++c) {
      if (std::find(chosen, end, c) == end) values[c] = -std::numeric_limits<float>::infinity();
    }
  }
}

Times run(const Options& o) {
  const auto device = kernels::make_cpu_device({o.threads, 0});
  const auto stream = device->make_stream(kernels::StreamKind::kCompute);
  predictor::PolicyConfig config;
  config.kind = predictor::PolicyKind::kAttentionPredictor;
  config.budget_tokens = o.budget_tokens;
  config.history_type = history_type(o.history);
  predictor::PolicyShape shape;
  shape.kv.num_layers = o.layers;
  shape.kv.num_kv_heads = o.heads;
  shape.kv.head_dim = 64;
  shape.num_heads = o.heads;
  const auto policy = predictor::make_policy(config, shape, *device).value_or_throw();
  const auto state = policy->admit(o.columns * kBlockTokens, *stream);

  const std::vector<float> lse(static_cast<std::size_t>(o.heads), 0.0F);
  const std::int32_t columns = o.columns;
  Attention attention(o.heads, o);
  std::vector<float> row;
  predictor::DecodeBatch batch;
  batch.rows = 1;
  batch.histories = &state->history;
  batch.selections = &state->selection;

  Times times;
  for (int step = 0; step < kernels::kHistoryRows + o.steps; ++step) {
    attention.next(&row);
    double append = 0;
    for (int layer = 0; layer < o.layers; ++layer) {
      // Layers share the row: what differs between them costs the same.
      std::vector<float> masked = row;
      if (o.masked && step >= kernels::kHistoryRows && step % 5 != 0) {
        mask(state->selection, layer, o, &masked);
      }
      predictor::AttentionRows rows;
      rows.block_max = masked.data();
      rows.lse = lse.data();
      rows.pitch = o.columns;
      rows.num_columns = &columns;
      const auto start = Clock::now();
      policy->observe_decode(batch, layer, rows, *stream);
      append += ms_since(start);
    }
    if (step < kernels::kHistoryRows - 1) continue;
    const auto start = Clock::now();
    const double cpu_start = thread_cpu_ms();
    policy->select_ahead(batch, *stream);
    const double cpu = thread_cpu_ms() - cpu_start;
    const double select = ms_since(start);
    if (step == kernels::kHistoryRows - 1) {
      times.first_select_ms = select;
    } else {
      times.append_ms.push_back(append);
      times.select_ms.push_back(select);
      times.select_cpu_ms.push_back(cpu);
    }
  }
  return times;
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("Time of the predictor a decode step, on synthetic attention");
  app.add_option("--layers", o.layers)->check(CLI::PositiveNumber);
  app.add_option("--heads", o.heads, "maps a layer")->check(CLI::PositiveNumber);
  app.add_option("--columns", o.columns, "context in blocks")->check(CLI::Range(9, 1 << 20));
  app.add_option("--threads", o.threads, "0: all");
  app.add_option("--steps", o.steps)->check(CLI::PositiveNumber);
  app.add_option("--budget", o.budget_tokens);
  app.add_option("--spread", o.spread, "sigma of the block logits");
  app.add_option("--mass", o.mass, "sum of a row");
  app.add_option("--history", o.history)->check(CLI::IsMember({"fp32", "bf16", "e5m3"}));
  app.add_flag("--masked", o.masked, "between calibrations only chosen blocks have values");
  app.add_flag("--json", o.json);
  CLI11_PARSE(app, argc, argv);
  try {
    const Times times = run(o);
    const nlohmann::json out = {{"layers", o.layers},
                                {"maps", o.layers * o.heads},
                                {"columns", o.columns},
                                {"threads", o.threads},
                                {"history", o.history},
                                {"masked", o.masked},
                                {"append_ms", median(times.append_ms)},
                                {"select_ms", median(times.select_ms)},
                                {"select_min_ms", quickest(times.select_ms)},
                                {"select_cpu_ms", median(times.select_cpu_ms)},
                                {"first_select_ms", times.first_select_ms}};
    if (o.json) {
      std::printf("%s\n", out.dump().c_str());
    } else {
      std::printf(
          "%d maps of %d columns: rows %.2f ms, select %.2f ms (quickest %.2f, first %.1f)\n",
          o.layers * o.heads, o.columns, median(times.append_ms), median(times.select_ms),
          quickest(times.select_ms), times.first_select_ms);
    }
  } catch (const Exception& e) {
    std::fprintf(stderr, "predictor_bench: %s\n", e.what());
    return exit_code(e.error().code);
  }
}
