#include "launch/internal/device_bench.h"

#include <poll.h>
#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <nlohmann/json.hpp>

#include "launch/internal/files.h"
#include "launch/internal/process.h"
#include "launch/internal/svg_plot.h"

namespace foretoken::launch {
namespace {

using Json = nlohmann::ordered_json;

// A flag that goes to the worker's program as it was given; what it takes is checked there.
struct PassedFlag {
  const char* name;
  const char* values;
  const char* help;
};

constexpr std::array kDeviceFlags = {
    PassedFlag{"--device", "auto|cuda|cpu", "Where to measure (auto: GPU if any)"},
    PassedFlag{"--threads", "N", "CPU device: threads (0: all)"}};
constexpr std::array kGatherFlags = {
    PassedFlag{"--context", "N", "Tokens whose KV lies in host memory (default: 131072)"},
    PassedFlag{"--budget", "TOKENS", "What a step attends a KV head (default: 2304)"},
    PassedFlag{"--churn", "P,...", "% of the critical blocks that are new (default: 2,8,20,100)"},
    PassedFlag{"--block-kib", "K,...", "Sizes of a block (default: the model's)"}};

constexpr std::array kPredictorFlags = {
    PassedFlag{"--context", "N,...", "Tokens (default: 8192,32768,131072)"},
    PassedFlag{"--hot", "P,...",
               "% of the segments that need the whole network (default: 0,12,100)"},
    PassedFlag{"--budget", "TOKENS", "What a map's choice is a part of (default: 1024)"},
    PassedFlag{"--batch", "B", "Sequences (default: 1)"}};

// Which fields of its rows a bench's plot shows: a series for each value of the last ones.
struct PlotFields {
  const char* x;
  const char* x_label;
  const char* y;
  const char* y_label;
  std::vector<const char*> series;
};

struct DeviceBench {
  std::string kind;
  PlotFields plot_fields;
  std::string plot = {};  // file; empty: none
  std::string model = {};
  std::vector<std::string> words = {};  // passed flags
  bool json = false;
};

// What it prints, until it closes its output.
std::string output_of(const Process& process) {
  std::string output;
  std::array<char, 4096> part{};
  for (;;) {
    const ssize_t count = read(process.output_fd(), part.data(), part.size());
    if (count == 0) return output;
    if (count > 0) output.append(part.data(), static_cast<std::size_t>(count));
    pollfd more{.fd = process.output_fd(), .events = POLLIN, .revents = 0};
    if (count < 0) poll(&more, 1, /*timeout=*/-1);
  }
}

std::string cell(const Json& value) {
  if (value.is_number_float()) return fmt::format("{:.4g}", value.get<double>());
  return value.is_string() ? value.get<std::string>() : value.dump();
}

// Its numbers in a line, then its rows as a table.
void print_for_people(const Json& json) {
  for (const auto& [name, value] : json.items()) {
    if (!value.is_array()) std::cout << fmt::format("{}: {}\n", name, cell(value));
  }
  for (const auto& [name, value] : json["rows"][0].items()) {
    std::cout << fmt::format("{:>16}", name);
  }
  for (const Json& row : json["rows"]) {
    std::cout << "\n";
    for (const Json& value : row) std::cout << fmt::format("{:>16}", cell(value));
  }
  std::cout << std::endl;
}

Plot plot_of(const Json& json, const PlotFields& fields) {
  Plot plot{.title = "bench " + cell(json["bench"]) + ", " + cell(json["device"]),
            .x_label = fields.x_label,
            .y_label = fields.y_label,
            .series = {}};
  for (const Json& row : json["rows"]) {
    std::string name;
    for (const char* field : fields.series) {
      name += (name.empty() ? "" : ", ") + std::string(field) + " " + cell(row[field]);
    }
    auto found = std::ranges::find(plot.series, name, &Plot::Series::name);
    if (found == plot.series.end()) found = plot.series.insert(found, {name, {}});
    found->points.emplace_back(row[fields.x].get<double>(), row[fields.y].get<double>());
  }
  return plot;
}

// The program's exit code, where it fails: it has said why.
int measure(const DeviceBench& bench) {
  constexpr std::chrono::seconds kEndTimeout{10};
  Command command{.name = "foretoken-worker",
                  .argv = {sibling_program("foretoken-worker").string(), "bench", bench.kind,
                           "--model=" + find_model(bench.model).value_or_throw().string()},
                  .capture_output = true};
  command.argv.insert(command.argv.end(), bench.words.begin(), bench.words.end());
  Process process(command);
  const std::string output = output_of(process);
  const auto ended = process.wait(kEndTimeout);
  if (!ended || ended->signal != 0) {
    throw Exception(ErrorCode::kInternal,
                    command.name + " " + (ended ? ended->describe() : "does not end"));
  }
  if (!ended->ok()) return ended->code;
  if (!bench.plot.empty()) save_svg(plot_of(Json::parse(output), bench.plot_fields), bench.plot);
  if (bench.json) {
    std::cout << output << std::flush;
  } else {
    print_for_people(Json::parse(output));
  }
  return 0;
}

template <typename Flags>
void add_passed(CLI::App& app, const Flags& flags, std::vector<std::string>& words) {
  for (const PassedFlag& flag : flags) {
    const auto pass = [&words, name = flag.name](const std::string& text) {
      words.push_back(std::string(name) + "=" + text);
    };
    app.add_option_function<std::string>(flag.name, pass, flag.help)->type_name(flag.values);
  }
}

template <typename Flags>
void add_bench(CLI::App& parent, DeviceBench what, const std::string& about, const Flags& flags,
               Action& action) {
  auto bench = std::make_shared<DeviceBench>(std::move(what));
  CLI::App* app = parent.add_subcommand(bench->kind, about);
  app->add_option("--model", bench->model, "Whose shape to measure (folder or name)")
      ->type_name("MODEL")
      ->required();
  add_passed(*app, kDeviceFlags, bench->words);
  add_passed(*app, flags, bench->words);
  app->add_flag("--json", bench->json, "Print one JSON object");
  app->add_option("--plot", bench->plot, "Also draw the figures into this file")
      ->type_name("F.svg");
  app->callback([bench, &action] { action = [bench] { return measure(*bench); }; });
}

}  // namespace

void add_device_benches(CLI::App& bench, Action& action) {
  const PlotFields gather{"churn_percent", "new blocks, %", "gb_per_s", "GB/s", {"block_bytes"}};
  const PlotFields predictor{"context_tokens",
                             "context, tokens",
                             "predict_ms",
                             "ms a step",
                             {"predict_per", "history_type", "hot_percent"}};
  add_bench(bench, {.kind = "gather", .plot_fields = gather},
            "New blocks from host memory, as a decode step needs them", kGatherFlags, action);
  add_bench(bench, {.kind = "predictor", .plot_fields = predictor},
            "The predictor of a decode step, all layers, with its top-k", kPredictorFlags, action);
}

}  // namespace foretoken::launch
