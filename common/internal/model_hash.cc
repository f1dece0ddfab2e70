#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>

#include "common/internal/model_folder.h"
#include "common/model_config.h"
#include "common/safetensors.h"

namespace foretoken {
namespace {

constexpr std::size_t kSampleBytes = 4096;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    FT_CHECK(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }

  // Adds a piece with its length, so that two lists of pieces never run into the same bytes.
  void add(std::span<const std::byte> bytes) {
    const std::uint64_t size = bytes.size();
    update(&size, sizeof size);
    update(bytes.data(), bytes.size());
  }
  void add(std::string_view text) { add(std::as_bytes(std::span(text))); }

  std::string hex() {
    std::array<unsigned char, 32> digest{};
    FT_CHECK(EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1);
    constexpr std::string_view kDigits = "0123456789abcdef";
    std::string text;
    for (const unsigned char byte : digest) {
      text += kDigits[byte >> 4];
      text += kDigits[byte & 15];
    }
    return text;
  }

 private:
  void update(const void* bytes, std::size_t size) {
    FT_CHECK(EVP_DigestUpdate(context_.get(), bytes, size) == 1);
  }

  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

Result<std::string> model_hash(const std::filesystem::path& folder) {
  FT_ASSIGN_OR_RETURN(const auto config_path, internal::find_in_folder(folder, "config.json"));
  FT_ASSIGN_OR_RETURN(const std::string config,
                      internal::read_text(config_path, internal::kMaxConfigBytes));
  FT_ASSIGN_OR_RETURN(const ModelWeights weights, ModelWeights::open(folder));
  Sha256 hash;
  hash.add(config);
  for (const SafetensorsFile& file : weights.files()) {
    hash.add(std::to_string(file.file_bytes()));
    hash.add(file.header());
  }
  for (const std::string& name : weights.names()) {
    FT_ASSIGN_OR_RETURN(const TensorView view, weights.tensor(name));
    const std::size_t sample = std::min(kSampleBytes, view.bytes.size());
    hash.add(name);
    hash.add(view.bytes.first(sample));
    hash.add(view.bytes.subspan((view.bytes.size() - sample) / 2, sample));
  }
  return hash.hex();
}

}  // namespace foretoken
