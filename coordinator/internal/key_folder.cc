#include "coordinator/key_folder.h"

#include <nlohmann/json.hpp>
#include <sstream>

namespace foretoken::coordinator {
namespace {

using std::filesystem::path;

Result<KeyPair> read_pair(const path& file) {
  FT_ASSIGN_OR_RETURN(const auto text, read_private_file(file));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto key = [&json](const char* name) -> std::string {
    return json.is_object() && json.contains(name) && json[name].is_string() ? json[name] : "";
  };
  const KeyPair pair{key("public_key"), key("secret_key")};
  if (is_curve_key(pair.public_key) && is_curve_key(pair.secret_key)) return pair;
  return Error{ErrorCode::kConfig, "key file " + file.string() +
                                       " holds no CURVE key pair; remove it to have one made"};
}

Result<KeyPair> open_server_pair(const path& file) {
  if (std::filesystem::exists(file)) return read_pair(file);
  const auto pair = make_key_pair();
  const nlohmann::json json = {{"public_key", pair.public_key}, {"secret_key", pair.secret_key}};
  FT_RETURN_IF_ERROR(write_private_file(file, json.dump(2) + "\n"));
  return pair;
}

// A client file of another server's time is made anew.
Result<ClientKeys> open_client_keys(const path& file, const KeyPair& server) {
  if (std::filesystem::exists(file)) {
    FT_ASSIGN_OR_RETURN(auto keys, read_client_keys(file));
    if (keys.server_public_key == server.public_key) return keys;
  }
  const ClientKeys keys{server.public_key, make_key_pair()};
  FT_RETURN_IF_ERROR(write_client_keys(file, keys));
  return keys;
}

Result<std::vector<std::string>> read_authorized(const path& file) {
  std::vector<std::string> keys;
  if (!std::filesystem::exists(file)) return keys;
  FT_ASSIGN_OR_RETURN(const auto text, read_private_file(file));
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    if (line.empty() || line.starts_with('#')) continue;
    if (!is_curve_key(line)) {
      return Error{ErrorCode::kConfig, file.string() + ", line " + std::to_string(number) +
                                           ": not a CURVE public key of 40 characters"};
    }
    keys.push_back(line);
  }
  return keys;
}

}  // namespace

Result<ServiceKeys> open_key_folder(const path& folder) {
  ServiceKeys keys;
  FT_ASSIGN_OR_RETURN(keys.server, open_server_pair(folder / "server.key"));
  FT_ASSIGN_OR_RETURN(keys.client, open_client_keys(folder / "client.key", keys.server));
  FT_ASSIGN_OR_RETURN(keys.worker, open_client_keys(folder / "worker.key", keys.server));
  FT_ASSIGN_OR_RETURN(keys.authorized, read_authorized(folder / "authorized_keys"));
  return keys;
}

}  // namespace foretoken::coordinator
