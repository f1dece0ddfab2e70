// foretoken bench decode|prefill: the speed that a client of a real service sees.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <numeric>
#include <random>

#include "common/tokenizer.h"
#include "launch/internal/cli.h"
#include "launch/internal/connection.h"
#include "launch/internal/files.h"
#include "launch/internal/machine.h"
#include "launch/internal/report.h"

namespace foretoken::launch {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

struct BenchOptions {
  ModelOrConnectOptions service;
  int context = 512;
  int tokens = 64;
  int repeat = 1;
  std::string prompt_file;
  std::string tokenizer_model;  // with --connect: whose tokenizer reads prompt_file
  bool json = false;
};

// Random ids of a small range that any vocabulary has. A fixed seed: runs are comparable.
std::vector<TokenId> random_prompt(int length, int run) {
  constexpr int kFirst = 256;  // past special tokens and bytes of common vocabularies
  constexpr int kLast = 20000;
  std::mt19937 random(20261122U + static_cast<unsigned>(run));
  std::uniform_int_distribution<TokenId> pick(kFirst, kLast);
  std::vector<TokenId> ids(static_cast<std::size_t>(length));
  std::generate(ids.begin(), ids.end(), [&] { return pick(random); });
  return ids;
}

// The text's ids, repeated to `length`, and rotated a little a run, so that no run finds the prefix
// of another one in the KV store.
std::vector<TokenId> text_prompt(const std::vector<TokenId>& text, int length, int run) {
  std::vector<TokenId> ids;
  for (std::size_t i = 0; ids.size() < static_cast<std::size_t>(length); ++i) {
    ids.push_back(text[(i + 7 * static_cast<std::size_t>(run)) % text.size()]);
  }
  return ids;
}

struct Run {
  DoneMessage done;
  std::vector<double> token_ms;  // from one token to the next
};

Run run_once(client::Client& client, std::vector<TokenId> prompt, int tokens) {
  GenerateRequest request;
  request.prompt_ids = std::move(prompt);
  request.max_tokens = tokens;
  request.ignore_eos = true;
  request.sampling.temperature = 0;
  Run run;
  std::optional<Clock::time_point> last;
  const auto on_tokens = [&](const TokenMessage& message) {
    const auto now = Clock::now();
    if (last && !message.tokens.empty()) {
      const double ms = std::chrono::duration<double, std::milli>(now - *last).count();
      const auto count = message.tokens.size();  // several may come in one message
      run.token_ms.insert(run.token_ms.end(), count, ms / static_cast<double>(count));
    }
    last = now;
    return interrupted() ? client::StreamAction::kCancel : client::StreamAction::kContinue;
  };
  run.done = client.generate(request, on_tokens).value_or_throw();
  if (run.done.finish_reason == "cancelled") throw Exception(ErrorCode::kCancelled, "interrupted");
  return run;
}

double mean_of(const std::vector<double>& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Nearest rank.
double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5);
  return values[rank];
}

Json prefill_figures(const std::vector<Run>& runs) {
  std::vector<double> rates;
  for (const Run& run : runs) {
    const auto computed = run.done.usage.prompt_tokens - run.done.usage.cached_tokens;
    rates.push_back(1000.0 * static_cast<double>(computed) / run.done.timing.prefill_ms);
  }
  return {{"mean", mean_of(rates)}, {"median", percentile(rates, 0.5)}};
}

Json decode_figures(const std::vector<Run>& runs) {
  std::vector<double> ms;
  for (const Run& run : runs) ms.insert(ms.end(), run.token_ms.begin(), run.token_ms.end());
  return {{"mean", mean_of(ms)},
          {"median", percentile(ms, 0.5)},
          {"p95", percentile(ms, 0.95)},
          {"min", ms.empty() ? 0.0 : *std::min_element(ms.begin(), ms.end())}};
}

Json figures(const std::string& kind, const BenchOptions& options, const StatusReply& status,
             const std::vector<Run>& runs) {
  const DoneMessage& last = runs.back().done;
  Json json = {{"bench", kind},
               {"model", status.model},
               {"machine", machine_name()},
               {"device", status.device},
               {"tensor_parallel_size", status.tensor_parallel_size},
               {"policy", last.kv.policy},
               {"budget_tokens", last.kv.budget_tokens},
               {"context_tokens", last.usage.prompt_tokens},
               {"generated_tokens", last.usage.completion_tokens},
               {"repeat", options.repeat},
               {"prefill_tokens_per_s", prefill_figures(runs)}};
  if (kind == "decode") {
    json["ms_per_token"] = decode_figures(runs);
    json["tokens_per_s"] = 1000.0 / json["ms_per_token"]["mean"].get<double>();
  }
  json["kv"] = to_json(last.kv);
  return json;
}

void print_for_people(const Json& json) {
  std::cout << json["bench"].get<std::string>() << " of " << json["model"].get<std::string>()
            << ", " << json["policy"].get<std::string>() << ", context " << json["context_tokens"]
            << "\n";
  std::cout << "  prefill " << json["prefill_tokens_per_s"]["mean"] << " tokens/s\n";
  if (!json.contains("ms_per_token")) return;
  const Json& ms = json["ms_per_token"];
  std::cout << "  decode  " << json["tokens_per_s"] << " tokens/s; ms a token: mean " << ms["mean"]
            << ", median " << ms["median"] << ", p95 " << ms["p95"] << "\n";
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

int bench(const std::string& kind, const BenchOptions& options) {
  const std::vector<TokenId> text = read_prompt_text(options);
  const auto opened = options.service.open();
  const int tokens = kind == "prefill" ? 1 : options.tokens;
  std::vector<Run> runs;
  for (int i = 0; i < options.repeat; ++i) {
    auto prompt =
        text.empty() ? random_prompt(options.context, i) : text_prompt(text, options.context, i);
    runs.push_back(run_once(*opened.client, std::move(prompt), tokens));
    std::cerr << "run " << i + 1 << " of " << options.repeat << ": " << summary(runs.back().done)
              << "\n";
  }
  const Json json = figures(kind, options, opened.client->status().value_or_throw(), runs);
  if (options.json) {
    std::cout << json.dump() << std::endl;
  } else {
    print_for_people(json);
  }
  return 0;
}

void add_kind(CLI::App& parent, const std::string& kind, const std::string& about, Action& action) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* app = parent.add_subcommand(kind, about);
  const auto positive = CLI::PositiveNumber;
  app->add_option("--context", options->context, "Prompt tokens")
      ->type_name("N")
      ->capture_default_str()
      ->check(positive);
  if (kind == "decode") {
    app->add_option("--tokens", options->tokens, "Tokens to decode")
        ->type_name("N")
        ->capture_default_str()
        ->check(CLI::Range(2, 1 << 24));
  }
  app->add_option("--repeat", options->repeat, "Requests, one after another, no prefix in common")
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
    action = [kind, options] { return bench(kind, *options); };
  });
}

}  // namespace

void add_bench_command(CLI::App& app, Action& action) {
  CLI::App* parent = app.add_subcommand("bench", "Measure speed through a real service");
  parent->require_subcommand(1);
  add_kind(*parent, "decode", "Time from one token to the next, after a prompt", action);
  add_kind(*parent, "prefill", "Prompt tokens a second", action);
}

}  // namespace foretoken::launch
