#include "launch/internal/config_sources.h"

#include <gmock/gmock.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "launch/internal/files.h"
#include "launch/internal/service_flags.h"

namespace foretoken::launch {
namespace {

using testing::HasSubstr;

Environment environment_of(std::map<std::string, std::string> values) {
  return [values = std::move(values)](const std::string& name) -> std::optional<std::string> {
    const auto found = values.find(name);
    return found == values.end() ? std::nullopt : std::optional(found->second);
  };
}

class ConfigFile {
 public:
  explicit ConfigFile(const std::string& text) { std::ofstream(path()) << text; }
  std::filesystem::path path() const { return folder_.path() / "foretoken.toml"; }

 private:
  RuntimeFolder folder_;
};

TEST(ServiceFlags, EveryFieldHasAFlagAndEveryFlagAField) {
  const auto defaults = nlohmann::json::parse(to_json(ServiceConfig{}));
  std::set<std::string> fields;
  for (const auto& [field, value] : defaults.items()) fields.insert(field);
  fields.erase("model");  // the positional argument
  std::set<std::string> flags;
  for (const ServiceFlag& flag : service_flags()) flags.insert(std::string(flag.field));
  EXPECT_EQ(fields, flags);
}

TEST(ServiceFlags, SwitchesAreTheBooleans) {
  const auto defaults = nlohmann::json::parse(to_json(ServiceConfig{}));
  for (const ServiceFlag& flag : service_flags()) {
    EXPECT_EQ(flag.values.empty(), defaults.at(std::string(flag.field)).is_boolean()) << flag.field;
  }
}

TEST(ConfigSources, DefaultsWithoutAnySource) {
  const auto found = find_config({.flags = {}, .environment = environment_of({})});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->config, ServiceConfig{});
  EXPECT_EQ(found->origin.at("kv_budget"), "default");
}

TEST(ConfigSources, FlagBeatsEnvironmentBeatsFileBeatsDefault) {
  const ConfigFile file(
      "kv-budget = 512\nport = 1\nmax_num_seqs = 2\ngpu-memory-utilization = 1\n");
  const auto found = find_config(
      {.flags = {{"kv_budget", "2048"}},
       .environment = environment_of({{"FORETOKEN_KV_BUDGET", "256"}, {"FORETOKEN_PORT", "9"}}),
       .file = file.path()});
  ASSERT_TRUE(found) << found.error().message;
  EXPECT_EQ(found->config.kv_budget, 2048);
  EXPECT_EQ(found->origin.at("kv_budget"), "flag");
  EXPECT_EQ(found->config.port, 9);
  EXPECT_EQ(found->origin.at("port"), "environment");
  EXPECT_EQ(found->config.max_num_seqs, 2);
  EXPECT_EQ(found->origin.at("max_num_seqs"), "file " + file.path().string());
  EXPECT_EQ(found->config.gpu_memory_utilization, 1.0);  // a whole number for a real one
}

TEST(ConfigSources, UnknownKeyOfAFileNamesTheNearestOne) {
  const ConfigFile file("kv-bugdet = 512\n");
  const auto found =
      find_config({.flags = {}, .environment = environment_of({}), .file = file.path()});
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code, ErrorCode::kConfig);
  EXPECT_THAT(found.error().message, HasSubstr("kv_budget"));
}

TEST(ConfigSources, BrokenOrAbsentFileIsAnError) {
  const ConfigFile broken("kv-budget = \n");
  for (const auto& path : {broken.path(), std::filesystem::path("/nowhere/foretoken.toml")}) {
    const auto found = find_config({.flags = {}, .environment = environment_of({}), .file = path});
    ASSERT_FALSE(found);
    EXPECT_EQ(found.error().code, ErrorCode::kConfig);
    EXPECT_THAT(found.error().message, HasSubstr(path.string()));
  }
}

TEST(ConfigSources, WrongTypeInAFileIsAnError) {
  const ConfigFile file("kv-budget = \"many\"\n");
  const auto found =
      find_config({.flags = {}, .environment = environment_of({}), .file = file.path()});
  ASSERT_FALSE(found);
  EXPECT_THAT(found.error().message, HasSubstr("kv-budget"));
}

TEST(ConfigSources, FlagOfTheWrongTypeIsUsage) {
  for (const char* text : {"many", "10x", "", "1.5"}) {
    const auto found =
        find_config({.flags = {{"kv_budget", text}}, .environment = environment_of({})});
    ASSERT_FALSE(found) << text;
    EXPECT_EQ(found.error().code, ErrorCode::kUsage);
    EXPECT_THAT(found.error().message, HasSubstr("--kv-budget"));
  }
}

TEST(ConfigSources, BudgetBelowSinkAndLocalIsAConfigError) {
  const auto found =
      find_config({.flags = {{"kv_budget", "64"}}, .environment = environment_of({})});
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code, ErrorCode::kConfig);
}

TEST(ConfigSources, ToFlagsIsTheInverse) {
  ServiceConfig config;
  config.kv_budget = 512;
  config.insecure_bind = true;
  config.kv_host_gib = 0.5;
  config.kv_policy = "full";
  GivenFlags given;
  for (const std::string& flag : to_flags(config)) {
    const auto equals = flag.find('=');
    std::string field = flag.substr(2, equals - 2);
    std::replace(field.begin(), field.end(), '-', '_');
    given[field] = equals == std::string::npos ? "true" : flag.substr(equals + 1);
  }
  const auto found = find_config({.flags = given, .environment = environment_of({})});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->config, config);
}

}  // namespace
}  // namespace foretoken::launch
