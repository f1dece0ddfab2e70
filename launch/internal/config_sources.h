// Where a service's configuration comes from: command line, then environment (FORETOKEN_*), then a
// TOML file, then defaults. `foretoken config show --origin` prints what this finds.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "common/result.h"
#include "common/service_config.h"

namespace foretoken::launch {

// Flags as the user typed them: field of ServiceConfig -> text.
using GivenFlags = std::map<std::string, std::string>;
// nullopt where the variable isn't set.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;
Environment process_environment();

struct ConfigSources {
  GivenFlags flags;
  Environment environment = process_environment();
  std::optional<std::filesystem::path> file = {};
};

struct FoundConfig {
  ServiceConfig config;
  std::map<std::string, std::string> origin;  // field -> "default", "file F", "environment", "flag"
};

// Gathers and validates. Errors: kUsage for a flag's value of the wrong type; kConfig for a file
// that can't be read, an unknown key (with a "did you mean"), or what validate() refuses.
Result<FoundConfig> find_config(const ConfigSources& sources);

// The flags that turn a default service into this one, as `--name=value`.
std::vector<std::string> to_flags(const ServiceConfig& config);

}  // namespace foretoken::launch
