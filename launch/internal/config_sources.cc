#include "launch/internal/config_sources.h"

#include <toml++/toml.h>

#include <charconv>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "launch/internal/service_flags.h"

namespace foretoken::launch {
namespace {

using Json = nlohmann::json;

template <typename T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<bool> parse_bool(std::string_view text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  return std::nullopt;
}

// Text of a flag or a variable, as the type that the field's default has.
Result<Json> parse_like(const Json& model, const std::string& name, const std::string& text) {
  const auto wrong = [&](std::string_view wanted) {
    return Error{ErrorCode::kUsage,
                 name + " takes " + std::string(wanted) + ", and got '" + text + "'"};
  };
  if (model.is_boolean()) {
    const auto value = parse_bool(text);
    return value ? Result<Json>(Json(*value)) : wrong("true or false");
  }
  if (model.is_number_float()) {
    const auto value = parse_number<double>(text);
    return value ? Result<Json>(Json(*value)) : wrong("a number");
  }
  if (model.is_number()) {
    const auto value = parse_number<std::int64_t>(text);
    return value ? Result<Json>(Json(*value)) : wrong("a whole number");
  }
  return Json(text);
}

// A TOML value as the type that the field's default has; a whole number may stand for a real one.
Result<Json> convert_like(const Json& model, const toml::node& node, const std::string& where) {
  if (model.is_boolean() && node.is_boolean()) return Json(*node.value<bool>());
  if (model.is_number_float() && node.is_number()) return Json(*node.value<double>());
  if (model.is_number_integer() && node.is_integer()) return Json(*node.value<std::int64_t>());
  if (model.is_string() && node.is_string()) return Json(*node.value<std::string>());
  return Error{ErrorCode::kConfig, where + " should be a " + model.type_name()};
}

// Keys are the long flags, with '-' or '_'.
std::string field_of_key(std::string_view key) {
  std::string field(key);
  std::replace(field.begin(), field.end(), '-', '_');
  return field;
}

Error unknown_key(const std::string& where, const std::string& key, const Json& defaults) {
  std::vector<std::string> known;
  for (const auto& [field, value] : defaults.items()) known.push_back(field);
  const std::string near = nearest_name(field_of_key(key), known);
  std::string message = where + ": unknown key '" + key + "'";
  if (!near.empty()) message += "; did you mean '" + near + "'?";
  return {ErrorCode::kConfig, message};
}

Result<toml::table> parse_file(const std::filesystem::path& path, const std::string& text) {
  try {
    return toml::parse(text, path.string());
  } catch (const toml::parse_error& error) {
    std::ostringstream place;
    place << error.source().begin;
    return Error{ErrorCode::kConfig,
                 path.string() + ", " + place.str() + ": " + std::string(error.description())};
  }
}

Status add_file(const std::filesystem::path& path, const Json& defaults, Json& config,
                std::map<std::string, std::string>& origin) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in) return Error{ErrorCode::kConfig, "can't read the config file " + path.string()};
  FT_ASSIGN_OR_RETURN(const toml::table table, parse_file(path, text.str()));
  for (const auto& [key, node] : table) {
    const std::string name(key.str());
    const std::string field = field_of_key(name);
    if (!defaults.contains(field)) return unknown_key(path.string(), name, defaults);
    FT_ASSIGN_OR_RETURN(config[field],
                        convert_like(defaults[field], node, path.string() + ": " + name));
    origin[field] = "file " + path.string();
  }
  return Ok{};
}

Status add_texts(const GivenFlags& given, const Json& defaults, const std::string& from,
                 std::string (*name_of)(std::string_view), Json& config,
                 std::map<std::string, std::string>& origin) {
  for (const auto& [field, text] : given) {
    FT_CHECK(defaults.contains(field), field);
    FT_ASSIGN_OR_RETURN(config[field], parse_like(defaults[field], name_of(field), text));
    origin[field] = from;
  }
  return Ok{};
}

GivenFlags given_by(const Environment& environment, const Json& defaults) {
  GivenFlags given;
  for (const auto& [field, value] : defaults.items()) {
    if (auto text = environment(environment_name(field))) given[field] = *text;
  }
  return given;
}

}  // namespace

Environment process_environment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    if (value == nullptr) return std::nullopt;
    return std::string(value);
  };
}

Result<FoundConfig> find_config(const ConfigSources& sources) {
  const Json defaults = Json::parse(to_json(ServiceConfig{}));
  Json config = defaults;
  FoundConfig found;
  for (const auto& [field, value] : defaults.items()) found.origin[field] = "default";
  if (sources.file) FT_RETURN_IF_ERROR(add_file(*sources.file, defaults, config, found.origin));
  FT_RETURN_IF_ERROR(add_texts(given_by(sources.environment, defaults), defaults, "environment",
                               environment_name, config, found.origin));
  FT_RETURN_IF_ERROR(add_texts(sources.flags, defaults, "flag", flag_name, config, found.origin));
  FT_ASSIGN_OR_RETURN(found.config, service_config_from_json(config.dump()));
  ServiceConfig checked = found.config;
  if (checked.model.empty()) checked.model = "any";  // find_model() has a better message
  FT_RETURN_IF_ERROR(validate(checked));
  return found;
}

std::vector<std::string> to_flags(const ServiceConfig& config) {
  const Json defaults = Json::parse(to_json(ServiceConfig{}));
  const Json values = Json::parse(to_json(config));
  std::vector<std::string> flags;
  for (const ServiceFlag& flag : service_flags()) {
    const std::string field(flag.field);
    const Json& value = values.at(field);
    if (value == defaults.at(field)) continue;
    if (value.is_boolean()) {
      flags.push_back(flag_name(field));
    } else {
      const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      flags.push_back(flag_name(field) + "=" + text);
    }
  }
  return flags;
}

}  // namespace foretoken::launch
