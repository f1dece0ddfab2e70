// A model folder without weights: what a coordinator reads of a model. Token ids 0 to 255 are
// bytes, 256 is the end token; 2 layers, a context of 4,096.
#pragma once

#include <filesystem>

#include "common/tokenizer.h"

namespace foretoken::coordinator {

inline constexpr int kTinyEos = 256;
inline constexpr int kTinyVocab = 257;
inline constexpr int kTinyContext = 4096;
inline constexpr int kTinyLayers = 2;

void write_tiny_model(const std::filesystem::path& folder);
const Tokenizer& tiny_tokenizer();

}  // namespace foretoken::coordinator
