#include "common/internal/model_folder.h"

#include <fstream>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

namespace foretoken::internal {
namespace {

namespace fs = std::filesystem;

bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

// `real` lies directly in the folder, or in the blobs of the Hugging Face cache it belongs to:
// models--x/snapshots/REVISION/name is a link to models--x/blobs/HASH.
bool belongs_to(const fs::path& folder, const fs::path& real) {
  if (real.parent_path() == folder) return true;
  const fs::path snapshots = folder.parent_path();
  return snapshots.filename() == "snapshots" &&
         real.parent_path() == snapshots.parent_path() / "blobs";
}

// Called by the parser at each event: stops it, by throwing, where a limit is passed.
class JsonLimits {
 public:
  explicit JsonLimits(int max_depth) : max_depth_(max_depth) {}

  void on_event(nlohmann::json::parse_event_t event, const nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      keys_.emplace_back();
      if (std::cmp_greater(keys_.size(), max_depth_)) {
        throw std::length_error("it nests deeper than " + std::to_string(max_depth_));
      }
    } else if (event == Event::object_end || event == Event::array_end) {
      keys_.pop_back();
    } else if (event == Event::key && !keys_.back().insert(value).second) {
      throw std::length_error("the key " + value.dump() + " stands twice");
    }
  }

 private:
  int max_depth_;
  std::vector<std::set<std::string>> keys_;  // of each open object
};

}  // namespace

Error model_error(std::string message) { return {ErrorCode::kModelFile, std::move(message)}; }

Result<fs::path> find_in_folder(const fs::path& folder, const std::string& name) {
  if (!is_plain_name(name)) {
    return model_error(folder.string() + ": '" + name + "' isn't the plain name of a file in it");
  }
  std::error_code failed;
  const fs::path base = fs::canonical(folder, failed);
  if (failed) return model_error(folder.string() + ": " + failed.message());
  const fs::path real = fs::canonical(base / name, failed);
  if (failed) return model_error((folder / name).string() + ": " + failed.message());
  if (!belongs_to(base, real)) {
    return model_error((folder / name).string() + " leads out of the model folder, to " +
                       real.string());
  }
  if (!fs::is_regular_file(real, failed)) {
    return model_error((folder / name).string() + " isn't a regular file");
  }
  return real;
}

Result<std::string> read_text(const fs::path& path, std::size_t max_bytes) {
  std::ifstream file(path, std::ios::binary);
  std::string text(max_bytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.eof() && file.fail()) return model_error(path.string() + ": can't be read");
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.size() > max_bytes) {
    return model_error(path.string() + " is longer than the " + std::to_string(max_bytes) +
                       " bytes that are read");
  }
  return text;
}

Result<nlohmann::json> parse_json_object(std::string_view text, std::string_view file,
                                         int max_depth) {
  JsonLimits limits(max_depth);
  const auto callback = [&](int, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    limits.on_event(event, value);
    return true;
  };
  try {
    nlohmann::json json = nlohmann::json::parse(text, callback);
    if (!json.is_object()) return model_error(std::string(file) + ": it isn't a JSON object");
    return json;
  } catch (const nlohmann::json::exception& error) {
    return model_error(std::string(file) + ": it isn't JSON: " + error.what());
  } catch (const std::length_error& error) {
    return model_error(std::string(file) + ": " + error.what());
  }
}

}  // namespace foretoken::internal
