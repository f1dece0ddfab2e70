// foretoken generate: one prompt to one answer, with a private service or a running one.
#include <unistd.h>

#include <iostream>

#include "launch/internal/cli.h"
#include "launch/internal/connection.h"
#include "launch/internal/files.h"
#include "launch/internal/report.h"

namespace foretoken::launch {
namespace {

struct GenerateOptions {
  ModelOrConnectOptions service;
  std::string prompt;
  std::string prompt_file;
  std::string prompt_ids_file;
  std::string forced_ids_file;
  GenerateRequest request;
  bool no_special = false;
  bool stream = false;
  bool json = false;
  bool quiet = false;
};

void add_prompt_flags(CLI::App& app, GenerateOptions& options) {
  const std::string group = "Prompt";
  CLI::Option* text = app.add_option("--prompt", options.prompt, "The prompt");
  CLI::Option* file = app.add_option("--prompt-file", options.prompt_file,
                                     "A file with the prompt ('-': standard input)");
  CLI::Option* ids = app.add_option("--prompt-ids", options.prompt_ids_file,
                                    "A JSON list of token ids in place of a text");
  text->excludes(file)->excludes(ids)->type_name("TEXT")->group(group);
  file->excludes(ids)->type_name("F")->group(group);
  ids->type_name("F.json")->group(group);
  app.add_flag("--no-special", options.no_special,
               "Without the tokens that the tokenizer puts around a text")
      ->group(group);
}

void add_sampling_flags(CLI::App& app, GenerateOptions& options) {
  const std::string group = "Sampling";
  GenerateRequest& request = options.request;
  SamplingParams& sampling = request.sampling;
  const auto add = [&](const char* name, auto& value, const char* type, const char* help) {
    app.add_option(name, value, help)->type_name(type)->capture_default_str()->group(group);
  };
  app.add_option("--max-tokens", request.max_tokens,
                 "Longest answer (default: 256, or what the context leaves)")
      ->type_name("N")
      ->group(group);
  add("--temperature", sampling.temperature, "T", "0: the most probable token each time");
  add("--top-k", sampling.top_k, "K", "Only the K most probable tokens (0: all)");
  add("--top-p", sampling.top_p, "P", "Only the most probable tokens that sum up to P");
  add("--min-p", sampling.min_p, "P", "Only tokens with P times the best one's probability");
  add("--repetition-penalty", sampling.repetition_penalty, "F", "1: none");
  add("--presence-penalty", sampling.presence_penalty, "F", "0: none");
  add("--frequency-penalty", sampling.frequency_penalty, "F", "0: none");
  add("--seed", sampling.seed, "S", "The same seed gives the same answer");
  add("--logprobs", sampling.num_logprobs, "K", "Report the K best tokens at each place (--json)");
  app.add_option("--stop", request.stop, "A string that ends the answer; may be repeated")
      ->type_name("STR")
      ->group(group);
  app.add_flag("--ignore-eos", request.ignore_eos, "Go on past the model's end token")
      ->group(group);
  app.add_option("--forced-ids", options.forced_ids_file,
                 "JSON list of token ids to take in place of sampled ones (evaluation)")
      ->type_name("F.json")
      ->group(group);
}

void add_output_flags(CLI::App& app, GenerateOptions& options) {
  const std::string group = "Output";
  app.add_flag("--stream", options.stream, "Print the text as it comes")->group(group);
  app.add_flag("--json", options.json, "Print one JSON object: ids, text, KV report, times")
      ->group(group);
  app.add_flag("--quiet", options.quiet, "No summary on stderr")->group(group);
}

GenerateRequest make_request(const GenerateOptions& options) {
  GenerateRequest request = options.request;
  if (!options.prompt_ids_file.empty()) {
    request.prompt_ids = read_ids(options.prompt_ids_file).value_or_throw();
  } else if (!options.prompt_file.empty()) {
    request.prompt = read_text(options.prompt_file).value_or_throw();
  } else {
    request.prompt = options.prompt;
  }
  if (!options.forced_ids_file.empty()) {
    request.forced_ids = read_ids(options.forced_ids_file).value_or_throw();
  }
  request.add_special_tokens = !options.no_special;
  return request;
}

void print_answer(const GenerateOptions& options, const DoneMessage& done) {
  if (options.json) {
    const bool with_logprobs = options.request.sampling.num_logprobs > 0;
    std::cout << to_json(done, with_logprobs)
                     .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
              << "\n";
  } else {
    std::cout << (options.stream ? "" : done.text) << "\n";
  }
  std::cout.flush();
  if (!options.quiet && !options.json) std::cerr << "foretoken: " << summary(done) << "\n";
}

int generate(const GenerateOptions& options) {
  const GenerateRequest request = make_request(options);
  const auto opened = options.service.open();
  const bool print_pieces = options.stream && !options.json;
  const auto on_tokens = [print_pieces](const TokenMessage& message) {
    if (print_pieces) std::cout << message.text << std::flush;
    return interrupted() ? client::StreamAction::kCancel : client::StreamAction::kContinue;
  };
  const DoneMessage done = opened.client->generate(request, on_tokens).value_or_throw();
  print_answer(options, done);
  return done.finish_reason == "cancelled" ? exit_code(ErrorCode::kCancelled) : 0;
}

}  // namespace

void add_generate_command(CLI::App& app, Action& action) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* generate_app = app.add_subcommand("generate", "Answer one prompt");
  add_prompt_flags(*generate_app, *options);
  add_sampling_flags(*generate_app, *options);
  add_output_flags(*generate_app, *options);
  options->service.add_to(*generate_app);
  generate_app->callback([generate_app, options, &action] {
    options->service.check();
    const bool has_prompt = generate_app->count("--prompt") > 0 ||
                            generate_app->count("--prompt-file") > 0 ||
                            generate_app->count("--prompt-ids") > 0;
    if (!has_prompt) throw CLI::RequiredError("one of --prompt, --prompt-file and --prompt-ids");
    action = [options] { return generate(*options); };
  });
}

}  // namespace foretoken::launch
