// Vocabulary: the tokens of a byte-level BPE model, as bytes.
//
// tokenizer.json writes a token as text of the byte-level alphabet: one character for each byte
// ("Ġ" is a space), after GPT-2's bytes_to_unicode. A token with any other character, as an added
// token's may have, stands for its own UTF-8; words never match such a token.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/ids.h"

namespace foretoken::internal {

// The bytes that text of the byte-level alphabet stands for; nullopt for any other text.
std::optional<std::string> from_byte_alphabet(std::string_view text);

class Vocabulary {
 public:
  // The largest id a file may use: 4 times the largest vocabulary known (262,144).
  static constexpr TokenId kMaxId = (1 << 20) - 1;

  // Holds ids 0 to max_id. REQUIRES: 0 <= max_id <= kMaxId.
  explicit Vocabulary(TokenId max_id);
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;

  // Adds a token of the model, by its text in tokenizer.json; add_unmatched one that words never
  // match. False where the id is taken. REQUIRES: 0 <= id <= max_id; another text in each add().
  [[nodiscard]] bool add(TokenId id, std::string_view text);
  [[nodiscard]] bool add_unmatched(TokenId id, std::string_view text);

  // The id of a token that add() added, by its text in tokenizer.json.
  std::optional<TokenId> find_text(std::string_view text) const;
  // The same by its bytes, if its text is of the byte-level alphabet.
  std::optional<TokenId> find_word(std::string_view bytes) const;

  // What id adds to a decoded text. Empty for an id without a token, and out of range.
  std::string_view bytes(TokenId id) const;
  std::size_t size() const { return tokens_.size(); }  // the largest id plus 1

 private:
  bool place(TokenId id, std::string bytes);

  struct Token {
    bool used = false;
    std::string bytes;
  };
  std::vector<Token> tokens_;  // by id; never resized, since the maps hold views into it
  std::unordered_map<std::string_view, TokenId> words_;   // tokens of the alphabet, by bytes
  std::unordered_map<std::string_view, TokenId> others_;  // all other tokens, by text
};

}  // namespace foretoken::internal
