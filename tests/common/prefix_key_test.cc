// Known answers from Python's hashlib:
//   h = lambda *parts: sha256(b"".join(pack("<Q", len(p)) + p for p in parts)).digest()
//   root = h(b"foretoken-kv-1", b"salt", b"0123abcd", b"fp16")
//   first = h(root, b"dense", pack("<256i", *range(256)))
//   second = h(first, b"dense", pack("<256i", *range(256, 512)))
#include "common/prefix_key.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <numeric>
#include <set>
#include <string>
#include <vector>

namespace foretoken {
namespace {

std::string hex(const PrefixKey& key) {
  std::string text;
  for (const unsigned byte : key.bytes) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", byte);
    text += two;
  }
  return text;
}
std::vector<TokenId> tokens_from(TokenId first) {
  std::vector<TokenId> tokens(kSegmentTokens);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

TEST(PrefixKey, IsTheDocumentedChain) {
  const PrefixKey root = root_key("salt", "0123abcd", "fp16");
  const PrefixKey first = prefix_key(root, "dense", tokens_from(0));
  const PrefixKey second = prefix_key(first, "dense", tokens_from(256));
  EXPECT_EQ(hex(root), "a46f78c6fc13b05ea66526420a4123cca6651aa240174113f9e86b1c09d9f118");
  EXPECT_EQ(hex(first), "fdfe0192d77eefc74b8a99fe2cf357b049f91ba705dd8fdfbcd10ab9f3346bdc");
  EXPECT_EQ(hex(second), "65405f4434d81566b286459ce9e464df14d43687940aae3c88b08cf6d6e6d1b7");
}

// Whatever differs, the key does; also where only the border between two parts moves.
TEST(PrefixKey, TellsEveryPartApart) {
  const PrefixKey root = root_key("salt", "model", "fp16");
  std::set<PrefixKey> keys{root,
                           root_key("salt2", "model", "fp16"),
                           root_key("salt", "2model", "fp16"),
                           root_key("salt", "model", "bf16"),
                           root_key("saltmodel", "", "fp16"),
                           prefix_key(root, "dense", tokens_from(0)),
                           prefix_key(root, "attention-predictor/1024", tokens_from(0)),
                           prefix_key(root, "dense", tokens_from(1)),
                           prefix_key(PrefixKey{}, "dense", tokens_from(0))};
  EXPECT_EQ(keys.size(), 9U);
}

}  // namespace
}  // namespace foretoken
