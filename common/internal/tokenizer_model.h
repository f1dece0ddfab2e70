// TokenizerModel: everything that tokenizer.json says, checked and ready for use.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/ids.h"
#include "common/internal/tokenizer_added.h"
#include "common/internal/tokenizer_bpe.h"
#include "common/internal/tokenizer_normalizer.h"
#include "common/internal/tokenizer_vocabulary.h"
#include "common/internal/tokenizer_words.h"

namespace foretoken::internal {

// Immutable once read. A text goes through it in the order of the members.
struct TokenizerModel {
  AddedTokens added;  // found in the text as it comes
  Normalizer normalizer;
  AddedTokens normalized_added;  // found in the normalized text
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  std::vector<TokenId> before;  // what the post_processor puts before a text, as BOS ...
  std::vector<TokenId> after;   // ... and after it

  Vocabulary vocabulary{0};
  std::vector<bool> special;                           // by id
  std::unordered_map<std::string, TokenId> added_ids;  // by the content as tokenizer.json writes it
  std::optional<TokenId> bos;
  std::optional<TokenId> eos;

  std::optional<TokenId> find_token(std::string_view text) const;
};

// An empty config counts as absent. Throws Exception(kModelFile) that names file and field.
TokenizerModel read_tokenizer(std::string_view tokenizer_json, std::string_view config_json);

}  // namespace foretoken::internal
