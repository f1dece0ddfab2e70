// Files of a model folder: found without leaving it, read up to a limit, parsed up to a depth.
// Every error is kModelFile and names the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "common/result.h"

namespace foretoken::internal {

// config.json and generation_config.json: 1 MiB holds any that was ever written.
inline constexpr std::size_t kMaxConfigBytes = 1 << 20;

Error model_error(std::string message);

// The real path of `name` in the folder. Error when it isn't a plain file name, isn't a regular
// file, or is a link that leads elsewhere (a Hugging Face cache's own blobs folder is not
// elsewhere).
Result<std::filesystem::path> find_in_folder(const std::filesystem::path& folder,
                                             const std::string& name);

// The file's text. Error when it is longer than max_bytes.
Result<std::string> read_text(const std::filesystem::path& path, std::size_t max_bytes);

// A JSON object. Error when it is none, nests deeper than max_depth, or has a key twice; `file`
// names it in errors.
Result<nlohmann::json> parse_json_object(std::string_view text, std::string_view file,
                                         int max_depth);

}  // namespace foretoken::internal
