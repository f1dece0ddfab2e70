// The command line of `foretoken`: each *_command.cc adds its subcommand; run() parses and runs.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "launch/internal/config_sources.h"

namespace foretoken::launch {

// What the parsed subcommand does; the exit code is its result. Throws Exception.
using Action = std::function<int()>;

void add_serve_command(CLI::App& app, Action& action);
void add_generate_command(CLI::App& app, Action& action);
void add_tokenize_commands(CLI::App& app, Action& action);  // tokenize and detokenize
void add_bench_command(CLI::App& app, Action& action);
void add_store_bench(CLI::App& bench, Action& action);  // `bench store`
void add_kv_command(CLI::App& app, Action& action);
void add_model_command(CLI::App& app, Action& action);
void add_doctor_command(CLI::App& app, Action& action);
void add_config_command(CLI::App& app, Action& action);
void add_service_commands(CLI::App& app, Action& action);  // status and drain

// The exit code of a whole command line. Errors go to stderr, as one line.
int run(int argc, const char* const* argv);

// The flags of a service (service_flags.h) and --config, on a subcommand.
class ServiceOptions {
 public:
  void add_to(CLI::App& app);
  // After parsing. Throws Exception.
  FoundConfig find(const std::string& model) const;
  // One of the flags that were given, --config included; none: empty.
  std::string any_given() const;

 private:
  GivenFlags given_;
  std::string file_;
};

}  // namespace foretoken::launch
