#include "launch/internal/endpoint_file.h"

#include <nlohmann/json.hpp>

#include "common/socket.h"

namespace foretoken::launch {

using Json = nlohmann::json;

Status write_endpoint_file(const std::filesystem::path& path, const EndpointFile& content) {
  const Json json = {{"endpoint", content.endpoint},
                     {"key_file", content.key_file},
                     {"model", content.model},
                     {"pid", content.pid}};
  return write_private_file(path, json.dump(2) + "\n");
}

Result<EndpointFile> read_endpoint_file(const std::filesystem::path& path) {
  FT_ASSIGN_OR_RETURN(const std::string text, read_private_file(path));
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto has = [&json](const char* key, bool (Json::*is_type)() const) {
    return json.contains(key) && (json[key].*is_type)();
  };
  if (!json.is_object() || !has("endpoint", &Json::is_string) ||
      !has("key_file", &Json::is_string) || !has("model", &Json::is_string) ||
      !has("pid", &Json::is_number_integer)) {
    return Error{ErrorCode::kConfig, path.string() + " is no endpoint file of foretoken serve"};
  }
  return EndpointFile{json["endpoint"], json["key_file"], json["model"], json["pid"]};
}

}  // namespace foretoken::launch
