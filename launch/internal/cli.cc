#include "launch/internal/cli.h"

#include <iostream>

#include "launch/internal/service_flags.h"

namespace foretoken::launch {
namespace {

constexpr const char* kAbout =
    "Foretoken serves long-context language models whose KV cache does not fit in GPU memory: it\n"
    "predicts which KV blocks the next token needs, and has them there in time.";
constexpr const char* kExitCodes =
    "Exit codes: 0 ok, 2 usage, 3 configuration, 4 model file, 5 device, 6 port in use,\n"
    "75 try again, 1 anything else. Data goes to stdout, talk to stderr.\n"
    "Environment: FORETOKEN_LOG=debug|info|warn|error, FORETOKEN_MODELS=FOLDER, and every flag of\n"
    "`serve` as FORETOKEN_FLAG_NAME.";

// The subcommand that was being parsed, innermost.
const CLI::App& innermost(const CLI::App& app) {
  const auto chosen = app.get_subcommands();
  return chosen.empty() ? app : innermost(*chosen.front());
}

std::vector<std::string> names_of(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(sub->get_name());
  }
  return names;
}

// The unexpected word is a flag's name if any is: a mistyped flag's value is left over beside it.
std::string explain_extras(const CLI::App& app) {
  const CLI::App& at = innermost(app);
  std::string word;
  for (const std::string& extra : app.remaining(/*recurse=*/true)) {
    if (word.empty() || (word.front() != '-' && extra.front() == '-')) word = extra;
  }
  word = word.substr(0, word.find('='));
  const bool is_flag = word.rfind('-', 0) == 0;
  const std::string near = nearest_name(word, names_of(at));
  std::string message = (is_flag ? "unknown flag " : "unexpected argument ") + word;
  if (!near.empty()) message += "; did you mean " + near + "?";
  std::string where = at.get_name();
  for (const CLI::App* up = at.get_parent(); up != nullptr; up = up->get_parent()) {
    where = up->get_name() + " " + where;
  }
  return message + " See " + where + " --help";
}

int parse_and_run(CLI::App& app, const Action& action, int argc, const char* const* argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error, std::cout, std::cerr);  // --help
    // A word that is none of ours explains what else is missing.
    if (!app.remaining(/*recurse=*/true).empty()) {
      throw Exception(ErrorCode::kUsage, explain_extras(app));
    }
    throw Exception(ErrorCode::kUsage, error.what());
  }
  return action();
}

}  // namespace

void ServiceOptions::add_to(CLI::App& app) {
  app.add_option("--config", file_, "TOML file whose keys are the flags below")
      ->type_name("FILE")
      ->group("Configuration");
  for (const ServiceFlag& flag : service_flags()) {
    const std::string field(flag.field);
    CLI::Option* option = nullptr;
    if (flag.values.empty()) {
      option = app.add_flag_callback(
          flag_name(field), [this, field] { given_[field] = "true"; }, std::string(flag.help));
    } else {
      option = app.add_option_function<std::string>(
          flag_name(field), [this, field](const std::string& text) { given_[field] = text; },
          std::string(flag.help));
      option->type_name(std::string(flag.values));
    }
    option->group(std::string(flag.group));
  }
}

FoundConfig ServiceOptions::find(const std::string& model) const {
  ConfigSources sources{.flags = given_};
  if (!model.empty()) sources.flags["model"] = model;
  if (!file_.empty()) sources.file = file_;
  return find_config(sources).value_or_throw();
}

std::string ServiceOptions::any_given() const {
  if (!file_.empty()) return "--config";
  return given_.empty() ? "" : flag_name(given_.begin()->first);
}

int run(int argc, const char* const* argv) {
  CLI::App app(kAbout, "foretoken");
  app.footer(kExitCodes);
  app.set_version_flag("--version", FORETOKEN_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(36);
  Action action;
  add_serve_command(app, action);
  add_generate_command(app, action);
  add_tokenize_commands(app, action);
  add_bench_command(app, action);
  add_kv_command(app, action);
  add_model_command(app, action);
  add_doctor_command(app, action);
  add_config_command(app, action);
  add_service_commands(app, action);
  try {
    return parse_and_run(app, action, argc, argv);
  } catch (const Exception& error) {
    std::cerr << "foretoken: " << error.what() << "\n";
    return exit_code(error.error().code);
  } catch (const std::exception& error) {
    std::cerr << "foretoken: internal error: " << error.what() << "\n";
    return exit_code(ErrorCode::kInternal);
  }
}

}  // namespace foretoken::launch
