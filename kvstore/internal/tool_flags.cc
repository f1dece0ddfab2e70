#include "kvstore/internal/tool_flags.h"

#include <array>
#include <iostream>

#include "kvstore/internal/store_tools.h"

namespace foretoken::kvstore {
namespace {

using Json = nlohmann::ordered_json;

ToolTarget target(const BenchConfig& config, const std::string& key_file) {
  ToolTarget target{config.folder};
  if (!key_file.empty()) target.cipher = KvCipher::from_file(key_file);
  return target;
}

struct Tool {
  const char* name;
  const char* help;
  Json (*run)(const BenchConfig& config, const std::string& key_file);
};
constexpr std::array kTools = {
    Tool{"bench", "Measure the NVMe tier in this folder, and exit",
         [](const BenchConfig& config, const std::string&) { return run_store_bench(config); }},
    Tool{"stat", "Say what the NVMe file in this folder holds, and exit",
         [](const BenchConfig& config, const std::string& key_file) {
           return stat_file(target(config, key_file));
         }},
    Tool{"verify", "The same, after reading and checking all of it",
         [](const BenchConfig& config, const std::string& key_file) {
           return verify_file(target(config, key_file));
         }},
    Tool{"gc", "The same, and give back the space of what failed or is free",
         [](const BenchConfig& config, const std::string& key_file) {
           return collect_file(target(config, key_file));
         }},
};

void print_for_people(const Json& json) {
  for (const auto& [key, value] : json.items()) {
    std::cout << key << ": " << (value.is_string() ? value.get<std::string>() : value.dump())
              << "\n";
  }
}

}  // namespace

void ToolFlags::add_to(CLI::App& app) {
  for (const Tool& tool : kTools) {
    const auto take = [this, &tool](const std::string& folder) {
      tool_ = tool.name;
      bench_.folder = folder;
    };
    app.add_option_function<std::string>(std::string("--") + tool.name, take, tool.help)
        ->type_name("DIR")
        ->group("Tools");
  }
  app.add_option("--bench-bytes", bench_.bytes, "How much --bench writes and reads")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str()
      ->group("Tools");
  app.add_flag("--json", json_, "Tools print one JSON object")->group("Tools");
}

void ToolFlags::run(const std::string& key_file) const {
  for (const Tool& tool : kTools) {
    if (tool.name != tool_) continue;
    const Json json = tool.run(bench_, key_file);
    if (!json_) return print_for_people(json);
    std::cout << json.dump() << std::endl;
  }
}

}  // namespace foretoken::kvstore
