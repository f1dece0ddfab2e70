#include "tests/coordinator/tiny_model.h"

#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

namespace foretoken::coordinator {
namespace {

using Json = nlohmann::json;

// GPT-2's printable stand-in for a byte, as UTF-8.
std::string byte_letter(int byte, int& next) {
  const bool printable =
      (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
  const int code = printable ? byte : 256 + next++;
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

}  // namespace

void write_tiny_model(const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  Json vocab;
  int next = 0;
  for (int byte = 0; byte < 256; ++byte) vocab[byte_letter(byte, next)] = byte;
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const Json end = {{"id", kTinyEos},  {"content", "<|end|>"}, {"single_word", false},
                    {"lstrip", false}, {"rstrip", false},      {"normalized", false},
                    {"special", true}};
  const Json tokenizer = {{"version", "1.0"},
                          {"truncation", nullptr},
                          {"padding", nullptr},
                          {"added_tokens", {end}},
                          {"normalizer", nullptr},
                          {"pre_tokenizer", byte_level},
                          {"post_processor", nullptr},
                          {"decoder", byte_level},
                          {"model",
                           {{"type", "BPE"},
                            {"dropout", nullptr},
                            {"unk_token", nullptr},
                            {"continuing_subword_prefix", nullptr},
                            {"end_of_word_suffix", nullptr},
                            {"fuse_unk", false},
                            {"byte_fallback", false},
                            {"vocab", vocab},
                            {"merges", Json::array()}}}};
  const Json config = {{"architectures", {"LlamaForCausalLM"}},
                       {"model_type", "llama"},
                       {"hidden_size", 64},
                       {"num_hidden_layers", kTinyLayers},
                       {"num_attention_heads", 4},
                       {"num_key_value_heads", 2},
                       {"head_dim", 64},
                       {"intermediate_size", 128},
                       {"vocab_size", kTinyVocab},
                       {"max_position_embeddings", kTinyContext},
                       {"rms_norm_eps", 1e-5},
                       {"rope_theta", 10000.0},
                       {"hidden_act", "silu"},
                       {"tie_word_embeddings", true},
                       {"torch_dtype", "float16"},
                       {"eos_token_id", kTinyEos}};
  std::ofstream(folder / "tokenizer.json") << tokenizer.dump();
  std::ofstream(folder / "config.json") << config.dump();
}

const Tokenizer& tiny_tokenizer() {
  static const Tokenizer tokenizer = [] {
    const auto folder = std::filesystem::temp_directory_path() /
                        ("foretoken_tiny_tokenizer_" + std::to_string(::getpid()));
    write_tiny_model(folder);
    auto loaded = Tokenizer::load(folder).value_or_throw();
    std::filesystem::remove_all(folder);
    return loaded;
  }();
  return tokenizer;
}

}  // namespace foretoken::coordinator
