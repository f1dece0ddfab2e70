// AddedTokens: the tokens that are found in a text before it is cut into words, as <|im_start|>.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/ids.h"

namespace foretoken::internal {

struct AddedToken {
  TokenId id = 0;
  bool special = false;
  bool single_word = false;  // not inside a word
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
};

// A stretch of a text: an added token, or what lies between two.
struct AddedSplit {
  std::size_t begin;
  std::size_t end;
  std::optional<TokenId> id;
};

class AddedTokens {
 public:
  // What find() may walk over for each byte of a text; longer tokens are refused at load.
  static constexpr std::size_t kMaxContentBytes = 1024;

  // False if content was added before. REQUIRES: 0 < content.size() <= kMaxContentBytes.
  [[nodiscard]] bool add(std::string_view content, const AddedToken& token);

  // Replaces splits by those of text, in order, none empty. The leftmost match counts, of those the
  // longest; where `special` is false, a special token's text stays text.
  // REQUIRES: text is UTF-8.
  void find(std::string_view text, bool special, std::vector<AddedSplit>& splits) const;

 private:
  struct Node {
    std::optional<std::uint32_t> token;  // index into tokens_: a content ends here
  };
  struct Match {
    std::size_t end;
    const AddedToken* token;
  };
  static std::uint64_t edge(std::size_t node, char byte);
  std::optional<Match> longest_at(std::string_view text, std::size_t begin) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_{1};                              // a trie over bytes; 0 is its root
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // edge(node, byte) -> node
  std::array<bool, 256> first_bytes_{};                     // with which a content begins
};

}  // namespace foretoken::internal
