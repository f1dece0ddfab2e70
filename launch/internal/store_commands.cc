// foretoken kv and foretoken bench store: the store's own program does it (foretoken-kvstore
// --help, "Tools"), in our place.
#include "launch/internal/cli.h"
#include "launch/internal/files.h"
#include "launch/internal/process.h"

namespace foretoken::launch {
namespace {

struct ToolOptions {
  std::string folder;
  std::string bytes;
  std::string key_file;
  bool json = false;
};

// Returns only where the program can't be started.
int become_store_tool(const std::string& tool, const ToolOptions& options) {
  const std::string program = sibling_program("foretoken-kvstore").string();
  std::vector<std::string> words = {program, "--" + tool, options.folder};
  if (!options.bytes.empty()) words.push_back("--bench-bytes=" + options.bytes);
  if (!options.key_file.empty()) words.push_back("--key-file=" + options.key_file);
  if (options.json) words.emplace_back("--json");
  throw Exception(ErrorCode::kIo, "can't start " + program + ": " + become(words));
}

void add_tool(CLI::App& parent, const std::string& command, const std::string& tool,
              const std::string& about, Action& action) {
  auto options = std::make_shared<ToolOptions>();
  CLI::App* app = parent.add_subcommand(command, about);
  const bool is_bench = tool == "bench";
  app->add_option("DIR", options->folder,
                  is_bench ? "Folder on the disk to measure, which holds no KV; made if absent"
                           : "Folder of an NVMe tier (--kv-nvme-path)")
      ->required();
  if (is_bench) {
    app->add_option("--bytes", options->bytes, "How much to write and read (default: 2GiB)")
        ->type_name("SIZE");
  } else {
    app->add_option("--kv-key-file", options->key_file, "Key of an encrypted one")
        ->type_name("FILE");
  }
  app->add_flag("--json", options->json, "Print one JSON object");
  app->callback([tool, options, &action] {
    action = [tool, options] { return become_store_tool(tool, *options); };
  });
}

}  // namespace

void add_store_bench(CLI::App& bench, Action& action) {
  add_tool(bench, "store", "bench", "Speed of the KV store's NVMe tier in a folder", action);
}

void add_kv_command(CLI::App& app, Action& action) {
  CLI::App* kv = app.add_subcommand("kv", "The file of an NVMe tier that no service has in use");
  kv->require_subcommand(1);
  add_tool(*kv, "stat", "stat", "Whose KV it holds, and how much", action);
  add_tool(*kv, "verify", "verify", "The same, after reading and checking all of it", action);
  add_tool(*kv, "gc", "gc", "The same, and give back the space of what failed or is free", action);
}

}  // namespace foretoken::launch
