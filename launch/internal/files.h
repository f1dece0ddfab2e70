// Files and folders of the command: the runtime folder, model names, whole-file reads.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken::launch {

// A folder of this process alone (0700), removed with what is in it at the end.
class RuntimeFolder {
 public:
  // Under $XDG_RUNTIME_DIR if there is one that we own, else the temporary folder.
  // Throws Exception(kIo).
  RuntimeFolder();
  ~RuntimeFolder();
  RuntimeFolder(const RuntimeFolder&) = delete;
  RuntimeFolder& operator=(const RuntimeFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Errors: kInvalidArgument, naming the file. "-" is standard input.
Result<std::string> read_text(const std::filesystem::path& path);
// A JSON list of token ids. Error: kInvalidArgument.
Result<std::vector<std::int32_t>> read_ids(const std::filesystem::path& path);

// $FORETOKEN_MODELS, else $XDG_DATA_HOME/foretoken/models, else ~/.local/share/foretoken/models.
std::filesystem::path models_folder();
// A folder with a config.json as it is, or a name in models_folder().
// Error: kModelFile, with what to do.
Result<std::filesystem::path> find_model(const std::string& name_or_folder);

// A program of ours: beside this one. Throws Exception(kInternal) when it is not there.
std::filesystem::path sibling_program(const std::string& name);

// Python with the project's packages: $FORETOKEN_PYTHON, else the venv of a build folder above this
// program, else python3.
std::string python_program();
// Lets Python find our package in the sources above this program; no-op for an installed one.
void add_python_path();

}  // namespace foretoken::launch
