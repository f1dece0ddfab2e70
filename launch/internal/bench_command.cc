// foretoken bench decode|prefill: the speed that a client of a real service sees. The other benches
// are device_bench.h's.
#include <algorithm>
#include <array>
#include <iostream>
#include <map>
#include <optional>

#include "common/tokenizer.h"
#include "launch/internal/bench_figures.h"
#include "launch/internal/cli.h"
#include "launch/internal/connection.h"
#include "launch/internal/device_bench.h"
#include "launch/internal/files.h"

namespace foretoken::launch {
namespace {

using Json = nlohmann::ordered_json;

// Services of the same flags that the measured one is compared with.
enum class Baseline { kDense, kStreamed, kMemory };

struct BenchOptions {
  ModelOrConnectOptions service;
  BenchLoad load;
  std::string prompt_file;
  std::string tokenizer_model;  // with --connect: whose tokenizer reads prompt_file
  std::vector<Baseline> baselines;
  std::optional<int> baseline_tokens;
  std::string plot;  // file; empty: none
  bool json = false;
};

std::string_view name_of(Baseline baseline) {
  constexpr std::array<std::string_view, 3> kNames = {"dense", "streamed", "memory"};
  return kNames[static_cast<std::size_t>(baseline)];
}

// The same without NVMe, with host memory for what the batch has. REQUIRES: one host for all ranks.
ServiceConfig in_memory(ServiceConfig config, const Measured& measured) {
  const auto batch = static_cast<double>(measured.batches.front().runs.size());
  const double gib = static_cast<double>(measured.last().kv.full_kv_bytes) / (1 << 30) * batch;
  config.kv_host_gib = std::max(config.kv_host_gib, 1.25 * gib + 0.1);
  config.kv_nvme_path.clear();
  config.kv_nvme_gib = 0;
  config.kv_nvme_reuse = "auto";
  config.kv_persist = false;
  config.kv_encrypt = false;
  config.kv_key_file.clear();
  return config;
}

// Full attention, with the KV on the device or in host memory.
ServiceConfig config_of(Baseline baseline, ServiceConfig config, const Measured& measured) {
  if (baseline == Baseline::kMemory) return in_memory(config, measured);
  config.kv_policy = "full";
  config.kv_resident = baseline == Baseline::kDense ? "auto" : "never";
  config.trace.clear();
  return config;
}

Measured measure(client::Client& client, const BenchLoad& load) {
  Measured measured;
  measured.batches = run_load(client, load);
  measured.status = client.status().value_or_throw();
  return measured;
}

Measured measure_baseline(Baseline baseline, const BenchOptions& options,
                          const Measured& measured) {
  std::cerr << "baseline " << name_of(baseline) << "\n";
  const PrivateService service(config_of(baseline, options.service.service_config(), measured),
                               interrupted);
  const auto client = client::Client::connect(service.connection()).value_or_throw();
  BenchLoad load = options.load;
  load.tokens = options.baseline_tokens.value_or(load.tokens);
  return measure(*client, load);
}

std::vector<TokenId> read_prompt_text(const BenchOptions& options) {
  if (options.prompt_file.empty()) return {};
  const std::string model = options.service.is_private() ? options.service.service_config().model
                                                         : options.tokenizer_model;
  const Tokenizer tokenizer = Tokenizer::load(find_model(model).value_or_throw()).value_or_throw();
  auto ids = tokenizer.encode(read_text(options.prompt_file).value_or_throw()).value_or_throw();
  if (ids.empty()) throw Exception(ErrorCode::kUsage, "--prompt-file has no tokens");
  return ids;
}

// The service is gone when this returns: a baseline needs its memory.
Measured measure_service(const BenchOptions& options) {
  const auto opened = options.service.open();
  return measure(*opened.client, options.load);
}

int bench(const std::string& kind, BenchOptions options) {
  options.load.text = read_prompt_text(options);
  std::vector<std::pair<std::string, Measured>> services;
  services.emplace_back(kind, measure_service(options));
  Json json = figures(kind, options.load, services.front().second);
  if (kind == "decode") json["baselines"] = Json::array();
  std::optional<Exception> failed;  // a baseline; what was measured is told all the same
  for (const Baseline baseline : options.baselines) {
    const std::string name(name_of(baseline));
    try {
      services.emplace_back(name, measure_baseline(baseline, options, services.front().second));
      json["baselines"].push_back(
          baseline_figures(name, services.back().second, services.front().second));
    } catch (const Exception& failure) {
      if (interrupted()) throw;
      json["baselines"].push_back({{"baseline", name}, {"error", failure.what()}});
      failed = failure;
    }
  }
  if (!options.plot.empty()) save_svg(plot_of(json, services), options.plot);
  if (options.json) {
    std::cout << json.dump() << std::endl;
  } else {
    print_for_people(json);
  }
  if (failed) throw *failed;
  return 0;
}

void add_decode_flags(CLI::App& app, BenchOptions& options) {
  const std::map<std::string, Baseline> baselines = {{"dense", Baseline::kDense},
                                                     {"streamed", Baseline::kStreamed},
                                                     {"memory", Baseline::kMemory}};
  app.add_option("--tokens", options.load.tokens, "Tokens to decode")
      ->type_name("N")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  app.add_option(
         "--baseline", options.baselines,
         "Measure another service too, after this one and with its flags: full attention, the "
         "KV on the device (dense) or streamed from host memory; or the same policy, all KV "
         "in host memory and none on NVMe (memory); may be repeated")
      ->type_name("dense|streamed|memory")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->transform(CLI::CheckedTransformer(baselines).description(""));
  app.add_option("--baseline-tokens", options.baseline_tokens,
                 "Tokens that a baseline decodes (default: --tokens)")
      ->type_name("N")
      ->check(CLI::Range(2, 1 << 24));
  app.add_option("--plot", options.plot, "Also draw each token's time into this file")
      ->type_name("F.svg");
}

void add_kind(CLI::App& parent, const std::string& kind, const std::string& about, Action& action) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* app = parent.add_subcommand(kind, about);
  const auto positive = CLI::PositiveNumber;
  app->add_option("--context", options->load.context, "Prompt tokens")
      ->type_name("N")
      ->capture_default_str()
      ->check(positive);
  if (kind == "decode") {
    add_decode_flags(*app, *options);
  } else {
    options->load.tokens = 1;
  }
  app->add_option("--batch", options->load.batch, "Requests at a time (see --max-num-seqs)")
      ->type_name("B")
      ->capture_default_str()
      ->check(positive);
  app->add_option("--repeat", options->load.repeat,
                  "Batches, one after another, no prefix in common")
      ->type_name("R")
      ->capture_default_str()
      ->check(positive);
  app->add_option("--prompt-file", options->prompt_file,
                  "Text for the prompt, repeated to length (default: random tokens)")
      ->type_name("F");
  app->add_option("--tokenizer", options->tokenizer_model,
                  "With --connect and --prompt-file: the model folder")
      ->type_name("MODEL");
  app->add_flag("--json", options->json, "Print one JSON object");
  options->service.add_to(*app);
  app->callback([kind, options, &action] {
    options->service.check();
    if (!options->service.is_private() && !options->baselines.empty()) {
      throw CLI::ValidationError("--baseline", "needs --model: it starts a service of its own");
    }
    action = [kind, options] { return bench(kind, *options); };
  });
}

}  // namespace

void add_bench_command(CLI::App& app, Action& action) {
  CLI::App* parent = app.add_subcommand("bench", "Measure speed");
  parent->require_subcommand(1);
  add_kind(*parent, "decode", "Time from one token to the next, through a real service", action);
  add_kind(*parent, "prefill", "Prompt tokens a second, through a real service", action);
  add_device_benches(*parent, action);
  add_store_bench(*parent, action);
}

}  // namespace foretoken::launch
