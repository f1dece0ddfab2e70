#include "launch/internal/files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;

std::string environment_or(const char* name, const std::string& fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : fallback;
}

// Where sockets go. Their paths are at most 107 bytes long, so a long $TMPDIR is passed over.
fs::path runtime_parent() {
  const std::string given = environment_or("XDG_RUNTIME_DIR", "");
  struct stat info {};
  if (!given.empty() && stat(given.c_str(), &info) == 0 && S_ISDIR(info.st_mode) &&
      info.st_uid == geteuid() && (info.st_mode & 0077) == 0) {
    return given;
  }
  const std::string temporary = environment_or("TMPDIR", "/tmp");
  return temporary.size() < 60 ? temporary : "/tmp";
}

// The first folder above this program that has `inside` in it, with `inside` appended; or empty.
fs::path find_above(const fs::path& inside) {
  for (fs::path up = fs::read_symlink("/proc/self/exe"); up.has_relative_path();
       up = up.parent_path()) {
    if (fs::exists(up / inside)) return up / inside;
  }
  return {};
}

}  // namespace

RuntimeFolder::RuntimeFolder() {
  std::string name = (runtime_parent() / "foretoken-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) {
    throw Exception(ErrorCode::kIo, "can't make the runtime folder " + name + ": " +
                                        std::strerror(errno) + "; set XDG_RUNTIME_DIR or TMPDIR");
  }
  path_ = name;
}

RuntimeFolder::~RuntimeFolder() {
  std::error_code ignored;  // what can't be removed now is a temporary folder's
  fs::remove_all(path_, ignored);
}

Result<std::string> read_text(const fs::path& path) {
  std::stringstream text;
  if (path == "-") {
    text << std::cin.rdbuf();
    return text.str();
  }
  std::ifstream in(path, std::ios::binary);
  if (in.peek() != std::ifstream::traits_type::eof()) text << in.rdbuf();
  if (!in.is_open() || in.bad() || fs::is_directory(path)) {
    return Error{ErrorCode::kInvalidArgument, "can't read " + path.string()};
  }
  return text.str();
}

Result<std::vector<std::int32_t>> read_ids(const fs::path& path) {
  FT_ASSIGN_OR_RETURN(const std::string text, read_text(path));
  const auto parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const Error wrong{ErrorCode::kInvalidArgument, path.string() + " is no JSON list of token ids"};
  if (!parsed.is_array()) return wrong;
  std::vector<std::int32_t> ids;
  for (const auto& value : parsed) {
    if (!value.is_number_integer()) return wrong;
    const auto id = value.get<std::int64_t>();
    if (id < 0 || id > INT32_MAX) return wrong;
    ids.push_back(static_cast<std::int32_t>(id));
  }
  return ids;
}

fs::path models_folder() {
  const std::string given = environment_or("FORETOKEN_MODELS", "");
  if (!given.empty()) return given;
  const std::string home = environment_or("HOME", "/root");
  return fs::path(environment_or("XDG_DATA_HOME", home + "/.local/share")) / "foretoken" / "models";
}

Result<fs::path> find_model(const std::string& name_or_folder) {
  if (name_or_folder.empty()) {
    return Error{ErrorCode::kUsage, "no model given: name a folder, or a model of `model list`"};
  }
  const fs::path given(name_or_folder);
  if (given.extension() == ".gguf") {
    return Error{ErrorCode::kModelFile, name_or_folder +
                                            " is a GGUF file; make a model folder of " +
                                            "it first: foretoken model import " + name_or_folder};
  }
  const bool plain_name = name_or_folder.find('/') == std::string::npos;
  std::error_code failed;
  for (const fs::path& folder : {given, plain_name ? models_folder() / given : given}) {
    if (fs::exists(folder / "config.json", failed)) return fs::absolute(folder).lexically_normal();
    if (failed) {
      return Error{ErrorCode::kModelFile,
                   "can't look into the model folder " + folder.string() + ": " + failed.message()};
    }
  }
  if (fs::is_directory(given, failed)) {
    return Error{ErrorCode::kModelFile, name_or_folder + " is no model folder: no config.json"};
  }
  std::string message = "no model '" + name_or_folder + "'";
  if (plain_name) message += " here or in " + models_folder().string();
  return Error{ErrorCode::kModelFile,
               message + "; see foretoken model list, foretoken model fetch smollm2-135m"};
}

fs::path sibling_program(const std::string& name) {
  const fs::path program = fs::read_symlink("/proc/self/exe").parent_path() / name;
  if (access(program.c_str(), X_OK) != 0) {
    throw Exception(ErrorCode::kInternal,
                    program.string() + " is missing; build the whole of Foretoken");
  }
  return program;
}

std::string python_program() {
  const fs::path venv = find_above("venv/bin/python3");
  return environment_or("FORETOKEN_PYTHON", venv.empty() ? "python3" : venv.string());
}

void add_python_path() {
  const fs::path package = find_above("client/python/foretoken/__init__.py");
  if (package.empty()) return;
  const std::string ours = package.parent_path().parent_path().string();
  const std::string before = environment_or("PYTHONPATH", "");
  setenv("PYTHONPATH", (before.empty() ? ours : ours + ":" + before).c_str(), 1);
}

}  // namespace foretoken::launch
