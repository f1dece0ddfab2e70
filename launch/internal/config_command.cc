// foretoken config show: the configuration that `serve` would use, and where each value is from.
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "launch/internal/cli.h"

namespace foretoken::launch {
namespace {

struct ConfigOptions {
  ServiceOptions service;
  bool origin = false;
};

int show(const ConfigOptions& options) {
  const FoundConfig found = options.service.find("");
  const auto values = nlohmann::ordered_json::parse(to_json(found.config));
  for (const auto& [field, value] : values.items()) {
    std::string line = field + " = " + value.dump();
    if (options.origin) {
      line.resize(std::max<std::size_t>(line.size() + 2, 48), ' ');
      line += "# " + found.origin.at(field);
    }
    std::cout << line << "\n";
  }
  return 0;
}

}  // namespace

void add_config_command(CLI::App& app, Action& action) {
  CLI::App* config =
      app.add_subcommand("config", "Configuration: flag > environment > file > default");
  config->require_subcommand(1);
  auto options = std::make_shared<ConfigOptions>();
  CLI::App* show_app = config->add_subcommand("show", "Print the configuration, as TOML");
  show_app->add_flag("--origin", options->origin, "Say where each value comes from");
  options->service.add_to(*show_app);
  show_app->callback([options, &action] { action = [options] { return show(*options); }; });
}

}  // namespace foretoken::launch
