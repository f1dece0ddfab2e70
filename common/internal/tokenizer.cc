#include "common/tokenizer.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>

#include "common/internal/model_folder.h"
#include "common/internal/tokenizer_model.h"
#include "common/internal/utf8.h"

namespace foretoken {
namespace {

constexpr std::size_t kMaxTokenizerBytes = 128U << 20;  // the largest known has 34 MB
constexpr std::size_t kMaxTextBytes = 1U << 30;

// One text on its way through the model.
class Encoding {
 public:
  Encoding(const internal::TokenizerModel& model, std::size_t text_bytes)
      : model_(model), words_encoder_(model.bpe, model.vocabulary, text_bytes) {}

  Status add_text(std::string_view text, bool allow_special) {
    std::vector<internal::AddedSplit> outer;
    std::vector<internal::AddedSplit> inner;
    model_.added.find(text, allow_special, outer);
    for (const auto& split : outer) {
      if (add_token(split)) continue;
      const std::string_view part =
          model_.normalizer.normalize(text.substr(split.begin, split.end - split.begin), storage_);
      model_.normalized_added.find(part, allow_special, inner);
      for (const auto& piece : inner) {
        if (add_token(piece)) continue;
        FT_RETURN_IF_ERROR(add_words(part.substr(piece.begin, piece.end - piece.begin)));
      }
    }
    return Ok{};
  }

  void add_ids(const std::vector<TokenId>& ids) { ids_.insert(ids_.end(), ids.begin(), ids.end()); }
  std::vector<TokenId> take_ids() { return std::move(ids_); }

 private:
  bool add_token(const internal::AddedSplit& split) {
    if (split.id) ids_.push_back(*split.id);
    return split.id.has_value();
  }

  Status add_words(std::string_view text) {
    FT_RETURN_IF_ERROR(model_.pre_tokenizer.split(text, words_, storage_));
    for (const std::string_view word : words_) words_encoder_.encode(word, ids_);
    return Ok{};
  }

  const internal::TokenizerModel& model_;
  internal::WordEncoder words_encoder_;
  std::deque<std::string> storage_;  // texts that words_ and the encoder's cache view
  std::vector<std::string_view> words_;
  std::vector<TokenId> ids_;
};

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const internal::TokenizerModel> model)
    : model_(std::move(model)) {}

Result<Tokenizer> Tokenizer::load(const std::filesystem::path& model_folder) {
  FT_ASSIGN_OR_RETURN(const auto path, internal::find_in_folder(model_folder, "tokenizer.json"));
  const auto max_bytes =
      std::min<std::uintmax_t>(kMaxTokenizerBytes, std::filesystem::file_size(path));
  FT_ASSIGN_OR_RETURN(const auto text, internal::read_text(path, max_bytes));
  std::string config;
  if (std::filesystem::exists(model_folder / "tokenizer_config.json")) {
    FT_ASSIGN_OR_RETURN(const auto config_path,
                        internal::find_in_folder(model_folder, "tokenizer_config.json"));
    FT_ASSIGN_OR_RETURN(config, internal::read_text(config_path, internal::kMaxConfigBytes));
  }
  auto tokenizer = parse(text, config);
  if (tokenizer) return tokenizer;
  return internal::model_error(model_folder.string() + ": " + tokenizer.error().message);
}

Result<Tokenizer> Tokenizer::parse(std::string_view tokenizer_json,
                                   std::string_view tokenizer_config_json) {
  try {
    return Tokenizer(std::make_shared<const internal::TokenizerModel>(
        internal::read_tokenizer(tokenizer_json, tokenizer_config_json)));
  } catch (const Exception& exception) {
    return exception.error();
  }
}

Result<std::vector<TokenId>> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kMaxTextBytes) {
    return Error{ErrorCode::kInvalidArgument, "the text is longer than 1 GiB"};
  }
  const std::size_t bad = internal::find_ill_formed_utf8(text);
  if (bad < text.size()) {
    return Error{ErrorCode::kInvalidArgument,
                 "the text is not UTF-8 at byte " + std::to_string(bad)};
  }
  Encoding encoding(*model_, text.size());
  if (options.add_special) encoding.add_ids(model_->before);
  FT_RETURN_IF_ERROR(encoding.add_text(text, options.allow_special));
  if (options.add_special) encoding.add_ids(model_->after);
  return encoding.take_ids();
}

std::string Tokenizer::decode(std::span<const TokenId> ids, SpecialTokens special) const {
  std::string bytes;
  for (const TokenId id : ids) {
    if (special == SpecialTokens::kKeep || !is_special(id)) bytes += token_bytes(id);
  }
  std::string text;
  internal::append_lossy_utf8(bytes, text);
  return text;
}

std::string_view Tokenizer::token_bytes(TokenId id) const { return model_->vocabulary.bytes(id); }

bool Tokenizer::is_special(TokenId id) const {
  return id >= 0 && static_cast<std::size_t>(id) < model_->special.size() && model_->special[id];
}

std::optional<TokenId> Tokenizer::find_token(std::string_view text) const {
  return model_->find_token(text);
}

std::size_t Tokenizer::vocab_size() const { return model_->vocabulary.size(); }
std::optional<TokenId> Tokenizer::bos() const { return model_->bos; }
std::optional<TokenId> Tokenizer::eos() const { return model_->eos; }

StreamDecoder::StreamDecoder(Tokenizer tokenizer, SpecialTokens special)
    : tokenizer_(std::move(tokenizer)), special_(special) {}

std::string StreamDecoder::push(TokenId id) {
  std::string text;
  if (special_ == SpecialTokens::kSkip && tokenizer_.is_special(id)) return text;
  pending_ += tokenizer_.token_bytes(id);
  pending_.erase(0, internal::append_complete_utf8(pending_, text));
  return text;
}

std::string StreamDecoder::flush() {
  std::string text;
  internal::append_lossy_utf8(pending_, text);
  pending_.clear();
  return text;
}

}  // namespace foretoken
