// foretoken model list|show|verify|fetch|import: model folders. Fetching and importing is Python's
// (client/python/foretoken), as the `gguf` package is.
#include <iostream>
#include <nlohmann/json.hpp>

#include "common/model_config.h"
#include "common/safetensors.h"
#include "common/tokenizer.h"
#include "launch/internal/cli.h"
#include "launch/internal/files.h"
#include "launch/internal/process.h"

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;

int list() {
  const fs::path folder = models_folder();
  if (!fs::is_directory(folder)) {
    std::cerr << "foretoken: no models in " << folder.string()
              << "; try: foretoken model fetch smollm2-135m\n";
    return 0;
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::error_code unreadable;
    if (!fs::exists(entry.path() / "config.json", unreadable)) continue;
    std::cout << entry.path().filename().string() << "\t" << entry.path().string() << "\n";
  }
  return 0;
}

int show(const std::string& name) {
  const fs::path folder = find_model(name).value_or_throw();
  const ModelConfig config = read_model_config(folder).value_or_throw();
  const nlohmann::ordered_json json = {{"folder", folder.string()},
                                       {"family", model_family_name(config.family)},
                                       {"num_layers", config.num_layers},
                                       {"hidden_size", config.hidden_size},
                                       {"num_heads", config.num_heads},
                                       {"num_kv_heads", config.num_kv_heads},
                                       {"head_dim", config.head_dim},
                                       {"intermediate_size", config.intermediate_size},
                                       {"vocab_size", config.vocab_size},
                                       {"max_position", config.max_position},
                                       {"tie_word_embeddings", config.tie_word_embeddings},
                                       {"hash", model_hash(folder).value_or_throw()}};
  std::cout << json.dump(2) << "\n";
  return 0;
}

// Reads all of what a service reads, so that a broken folder shows here first.
int verify(const std::string& name) {
  const fs::path folder = find_model(name).value_or_throw();
  read_model_config(folder).value_or_throw();
  Tokenizer::load(folder).value_or_throw();
  const std::string hash = model_hash(folder).value_or_throw();
  std::cerr << "foretoken: " << folder.string() << " is in order\n";
  std::cout << hash << "\n";
  return 0;
}

// Becomes `python3 -m MODULE ARGUMENTS...`.
int become_python(const std::string& module, const std::vector<std::string>& arguments) {
  const std::string python = python_program();
  std::vector<std::string> words = {python, "-m", module};
  words.insert(words.end(), arguments.begin(), arguments.end());
  add_python_path();
  throw Exception(ErrorCode::kNotFound, "can't run " + python + ": " + become(words) +
                                            "; bash launch/setup.sh makes build/venv");
}

void add_named(CLI::App& model, Action& action, const std::string& verb, const std::string& about,
               int (*run_verb)(const std::string&)) {
  auto name = std::make_shared<std::string>();
  CLI::App* app = model.add_subcommand(verb, about);
  app->add_option("MODEL", *name, "Model folder or name")->required();
  app->callback([=, &action] { action = [=] { return run_verb(*name); }; });
}

int fetch(const std::string& name) { return become_python("foretoken.model_fetch", {name}); }

int import(const std::string& file, const std::string& folder) {
  const fs::path made = folder.empty() ? models_folder() / fs::path(file).stem() : fs::path(folder);
  return become_python("foretoken.model_import", {file, made.string()});
}

}  // namespace

void add_model_command(CLI::App& app, Action& action) {
  CLI::App* model = app.add_subcommand("model", "Model folders: list, fetch, import, verify, show");
  model->require_subcommand(1);
  model->add_subcommand("list", "Models in $FORETOKEN_MODELS, by name and folder")
      ->callback([&action] { action = list; });
  add_named(*model, action, "fetch", "Get a known model (smollm2-135m); prints its folder", fetch);
  add_named(*model, action, "verify", "Read a model folder whole; prints its hash", verify);
  add_named(*model, action, "show", "A model's shape, as JSON", show);

  auto file = std::make_shared<std::string>();
  auto folder = std::make_shared<std::string>();
  CLI::App* import_app = model->add_subcommand("import", "Make a model folder of a GGUF file");
  import_app->add_option("FILE", *file, "The .gguf file")->required();
  import_app->add_option("FOLDER", *folder, "The folder to make (default: among the models)");
  import_app->callback([=, &action] { action = [=] { return import(*file, *folder); }; });
}

}  // namespace foretoken::launch
