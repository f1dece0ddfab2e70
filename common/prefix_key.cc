#include "common/prefix_key.h"

#include <openssl/evp.h>

#include <memory>

#include "common/check.h"

namespace foretoken {
namespace {

// One SHA-256 over length-prefixed parts.
class Digest {
 public:
  Digest() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    FT_CHECK(context_ != nullptr);
    FT_CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }
  Digest& add(const void* data, std::uint64_t bytes) {
    FT_CHECK(EVP_DigestUpdate(context_.get(), &bytes, sizeof bytes) == 1);
    FT_CHECK(EVP_DigestUpdate(context_.get(), data, bytes) == 1);
    return *this;
  }
  Digest& add(std::string_view part) { return add(part.data(), part.size()); }
  PrefixKey finish() {
    PrefixKey key;
    unsigned int size = 0;
    FT_CHECK(EVP_DigestFinal_ex(context_.get(), key.bytes.data(), &size) == 1);
    FT_CHECK(size == key.bytes.size(), size);
    return key;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

PrefixKey root_key(std::string_view tenant_salt, std::string_view model_hash,
                   std::string_view kv_type) {
  return Digest().add("foretoken-kv-1").add(tenant_salt).add(model_hash).add(kv_type).finish();
}

PrefixKey prefix_key(const PrefixKey& parent, std::string_view compute_tag,
                     std::span<const TokenId> tokens) {
  FT_CHECK(tokens.size() == kSegmentTokens, tokens.size());
  return Digest()
      .add(parent.bytes.data(), parent.bytes.size())
      .add(compute_tag)
      .add(tokens.data(), tokens.size_bytes())
      .finish();
}

}  // namespace foretoken
