// foretoken bench decode|prefill: the speed that a client of a real service sees. The other benches
// are device_bench.h's.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <map>
#include <numeric>
#include <random>

#include "common/tokenizer.h"
#include "launch/internal/cli.h"
#include "launch/internal/connection.h"
#include "launch/internal/device_bench.h"
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
  int batch = 1;
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

// One request, as its client saw it.
struct Run {
  struct Arrival {
    Clock::time_point time;
    std::size_t tokens;  // several may come in one message
  };
  std::vector<Arrival> arrivals;
  DoneMessage done;
  bool ended = false;
};

// Requests that run at the same time, and their speed while all of them decode.
struct Batch {
  std::vector<Run> runs;
  std::vector<double> token_ms;  // from one token of a request to its next
  double tokens_per_s = 0;       // of all requests together
};

GenerateRequest make_request(std::vector<TokenId> prompt, int tokens) {
  GenerateRequest request;
  request.prompt_ids = std::move(prompt);
  request.max_tokens = tokens;
  request.ignore_eos = true;
  request.sampling.temperature = 0;
  return request;
}

// Takes the next message in. Throws Exception when a request failed or the user has had enough.
void receive_one(client::Client& client, std::map<std::string, Run*>& by_id) {
  constexpr std::chrono::minutes kPatience{10};
  const ServerMessage message = client.receive(kPatience).value_or_throw();
  if (const auto* tokens = std::get_if<TokenMessage>(&message)) {
    by_id.at(tokens->request_id)->arrivals.push_back({Clock::now(), tokens->tokens.size()});
  } else if (const auto* done = std::get_if<DoneMessage>(&message)) {
    Run& run = *by_id.at(done->request_id);
    run.done = *done;
    run.ended = true;
  } else if (const auto* error = std::get_if<ErrorMessage>(&message)) {
    throw Exception(error_code_from_name(error->code).value_or(ErrorCode::kInternal),
                    error->message);
  }
  if (!interrupted()) return;
  for (const auto& [id, run] : by_id) client.cancel(id).value_or_throw();
  throw Exception(ErrorCode::kCancelled, "interrupted");
}

void measure(Batch& batch) {
  Clock::time_point begin = Clock::time_point::min();
  Clock::time_point end = Clock::time_point::max();
  for (const Run& run : batch.runs) {
    if (run.arrivals.size() < 2) return;
    begin = std::max(begin, run.arrivals.front().time);
    end = std::min(end, run.arrivals.back().time);
  }
  std::size_t tokens = 0;
  for (const Run& run : batch.runs) {
    for (std::size_t i = 1; i < run.arrivals.size(); ++i) {
      const auto& [time, count] = run.arrivals[i];
      if (run.arrivals[i - 1].time < begin || time > end) continue;
      const std::chrono::duration<double, std::milli> took = time - run.arrivals[i - 1].time;
      batch.token_ms.insert(batch.token_ms.end(), count, took.count() / static_cast<double>(count));
      tokens += count;
    }
  }
  const std::chrono::duration<double> seconds = end - begin;
  if (seconds.count() > 0) batch.tokens_per_s = static_cast<double>(tokens) / seconds.count();
}

Batch run_batch(client::Client& client, std::vector<std::vector<TokenId>> prompts, int tokens) {
  Batch batch;
  batch.runs.resize(prompts.size());
  std::map<std::string, Run*> by_id;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    by_id[client.submit(make_request(std::move(prompts[i]), tokens)).value_or_throw()] =
        &batch.runs[i];
  }
  while (!std::ranges::all_of(batch.runs, &Run::ended)) receive_one(client, by_id);
  measure(batch);
  return batch;
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
          {"min", ms.empty() ? 0.0 : *std::min_element(ms.begin(), ms.end())}};
}

double decode_rate(const std::vector<Batch>& batches) {
  std::vector<double> rates;
  for (const Batch& batch : batches) rates.push_back(batch.tokens_per_s);
  return mean_of(rates);
}

Json figures(const std::string& kind, const BenchOptions& options, const StatusReply& status,
             const std::vector<Batch>& batches) {
  const DoneMessage& last = batches.back().runs.back().done;
  Json json = {{"bench", kind},
               {"model", status.model},
               {"machine", machine_name()},
               {"device", status.device},
               {"tensor_parallel_size", status.tensor_parallel_size},
               {"policy", last.kv.policy},
               {"budget_tokens", last.kv.budget_tokens},
               {"context_tokens", last.usage.prompt_tokens},
               {"generated_tokens", last.usage.completion_tokens},
               {"batch", options.batch},
               {"repeat", options.repeat},
               {"prefill_tokens_per_s", prefill_figures(batches)}};
  if (kind == "decode") {
    json["ms_per_token"] = decode_figures(batches);
    json["tokens_per_s"] = decode_rate(batches);
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
  std::vector<Batch> batches;
  for (int i = 0; i < options.repeat; ++i) {
    std::vector<std::vector<TokenId>> prompts;
    for (int row = 0; row < options.batch; ++row) {
      const int run = i * options.batch + row;
      prompts.push_back(text.empty() ? random_prompt(options.context, run)
                                     : text_prompt(text, options.context, run));
    }
    batches.push_back(run_batch(*opened.client, std::move(prompts), tokens));
    std::cerr << "run " << i + 1 << " of " << options.repeat << ": "
              << summary(batches.back().runs.back().done) << "\n";
  }
  const Json json = figures(kind, options, opened.client->status().value_or_throw(), batches);
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
  app->add_option("--batch", options->batch, "Requests at a time (see --max-num-seqs)")
      ->type_name("B")
      ->capture_default_str()
      ->check(positive);
  app->add_option("--repeat", options->repeat, "Batches, one after another, no prefix in common")
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
  CLI::App* parent = app.add_subcommand("bench", "Measure speed");
  parent->require_subcommand(1);
  add_kind(*parent, "decode", "Time from one token to the next, through a real service", action);
  add_kind(*parent, "prefill", "Prompt tokens a second, through a real service", action);
  add_device_benches(*parent, action);
}

}  // namespace foretoken::launch
