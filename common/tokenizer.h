// Tokenizer: text to token ids and back, as the model folder's tokenizer.json says.
//
// Byte-level BPE with the rules of Hugging Face's `tokenizers` 0.23: the same ids for the same
// text, over every component that is read here:
//   normalizer      none, NFC, Sequence
//   pre_tokenizer   ByteLevel, alone or as the last of a Sequence of Split and Digits
//   model           BPE without dropout, prefixes, suffixes and byte_fallback
//   post_processor  none, TemplateProcessing, ByteLevel, Sequence
//   decoder         ByteLevel
// Anything else fails at load, with an error that names file and field, rather than giving other
// ids than the model was trained with. `truncation` and `padding` are not applied.
//
// Where `tokenizers` leans on other Unicode versions than our libraries, its versions hold:
// patterns see Unicode 16 (internal/tokenizer_unicode.h), NFC sees Unicode 9. Known differences:
// `single_word` of an added token looks at ICU's Unicode version, letters newer than that differ.
//
// Immutable once loaded: any thread may call any const member. Copies share one vocabulary.
// Example: tests/common/tokenizer_test.cc
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/ids.h"
#include "common/result.h"

namespace foretoken {

namespace internal {
struct TokenizerModel;
}

struct EncodeOptions {
  bool add_special = true;    // the tokens that the post_processor puts around a text, as BOS
  bool allow_special = true;  // a special token's text in the input becomes that token
};

// What decoding does with special tokens, as <|im_end|>.
enum class SpecialTokens { kSkip, kKeep };

class Tokenizer {
 public:
  // Reads tokenizer.json and, where there is one, tokenizer_config.json (for bos() and eos()).
  // Error: kModelFile, naming file and field.
  static Result<Tokenizer> load(const std::filesystem::path& model_folder);

  // The same from the contents of the two files; an empty second one counts as absent.
  static Result<Tokenizer> parse(std::string_view tokenizer_json,
                                 std::string_view tokenizer_config_json = {});

  // The ids of a text. A byte for which the vocabulary has no token is dropped, as `tokenizers`
  // does. Time O(n log n) for n bytes, also where a text is one long word.
  // Error: kInvalidArgument for a text that isn't UTF-8 or is longer than 1 GiB; kModelFile where
  // a pattern of tokenizer.json exceeds its match limit on this text.
  Result<std::vector<TokenId>> encode(std::string_view text, EncodeOptions options = {}) const;

  // The text of ids. Bytes that aren't UTF-8 become U+FFFD, one for each maximal ill-formed part
  // (Unicode 15, section 3.9, table 3-8). Ids without a token give nothing.
  std::string decode(std::span<const TokenId> ids,
                     SpecialTokens special = SpecialTokens::kSkip) const;

  // The bytes that an id adds to a decoded text; empty for an id without a token. Not always
  // UTF-8. Valid as long as the tokenizer or a copy of it lives.
  std::string_view token_bytes(TokenId id) const;
  bool is_special(TokenId id) const;

  // The id of a token by its text as tokenizer.json writes it, as "<|im_end|>".
  std::optional<TokenId> find_token(std::string_view text) const;

  // The largest id plus 1. Ids below it may lack a token.
  std::size_t vocab_size() const;

  // tokenizer_config.json's bos_token and eos_token.
  std::optional<TokenId> bos() const;
  std::optional<TokenId> eos() const;

 private:
  explicit Tokenizer(std::shared_ptr<const internal::TokenizerModel> model);
  std::shared_ptr<const internal::TokenizerModel> model_;
};

// StreamDecoder turns ids into text as they come, cut at UTF-8 borders: what push() and, at the
// end, flush() return adds up to decode() of all ids.
//
// Holds its tokenizer's vocabulary. For one thread at a time.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, SpecialTokens special = SpecialTokens::kSkip);

  // The text that id completes: empty while a character is incomplete.
  std::string push(TokenId id);

  // U+FFFD if a character is still incomplete, else nothing. Afterwards a new text may begin.
  std::string flush();

 private:
  Tokenizer tokenizer_;
  SpecialTokens special_;
  std::string pending_;  // the first 1 to 3 bytes of an incomplete character, or none
};

}  // namespace foretoken
