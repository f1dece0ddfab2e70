// The JSON header of a safetensors file, checked against the bytes it describes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"
#include "common/safetensors.h"

namespace foretoken::internal {

struct TensorEntry {
  std::string name;
  TensorDtype dtype = TensorDtype::kF32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // in the data that follows the header
  std::uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // sorted by name
  std::map<std::string, std::string, std::less<>> metadata;
};

// Upstream's limit, and ours on the number of tensors and of metadata entries.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr std::size_t kMaxTensors = 100'000;

// Parses and checks `text` for a file whose data has `data_bytes`; `file` names it in errors.
// Memory taken is proportional to the text. Error: kModelFile.
Result<SafetensorsHeader> parse_safetensors_header(std::string_view text, std::uint64_t data_bytes,
                                                   std::string_view file);

}  // namespace foretoken::internal
