#include "common/internal/tokenizer_model.h"

#include <algorithm>
#include <utility>

#include "common/internal/model_folder.h"
#include "common/internal/tokenizer_components.h"
#include "common/internal/tokenizer_json.h"
#include "common/result.h"

namespace foretoken::internal {
namespace {

constexpr std::string_view kFile = "tokenizer.json";
constexpr std::string_view kConfigFile = "tokenizer_config.json";
constexpr int kMaxDepth = 16;  // files of known models nest 7 deep

nlohmann::json parse_file(std::string_view text, std::string_view file) {
  return parse_json_object(text, file, kMaxDepth).value_or_throw();
}

TokenId max_id(const JsonField& root) {
  TokenId max = 0;
  const JsonField vocab = root["model"]["vocab"];
  for (const auto& [text, id] : vocab.object().items()) {
    if (!id.is_number_unsigned() || id > Vocabulary::kMaxId) {
      vocab[text].whole_number(Vocabulary::kMaxId);  // fails with the field's name
    }
    max = std::max(max, id.get<TokenId>());
  }
  if (root["added_tokens"].is_null()) return max;
  for (const JsonField& added : root["added_tokens"].elements()) {
    max = std::max(max, added["id"].whole_number(Vocabulary::kMaxId));
  }
  return max;
}

Vocabulary read_vocabulary(const JsonField& root) {
  Vocabulary vocabulary(max_id(root));
  const JsonField vocab = root["model"]["vocab"];
  for (const auto& [text, id] : vocab.object().items()) {
    if (!vocabulary.add(id.get<TokenId>(), text)) vocab[text].fail("another token has this id");
  }
  return vocabulary;
}

// A merge is a list of two tokens, or one string with a space between them.
std::pair<std::string_view, std::string_view> merge_parts(const JsonField& merges, std::size_t i) {
  const nlohmann::json& merge = merges.json()[i];
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return {merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>()};
  }
  if (merge.is_string()) {
    const std::string_view text = merge.get_ref<const std::string&>();
    const std::size_t space = text.find(' ');
    if (space != std::string_view::npos && space == text.rfind(' ')) {
      return {text.substr(0, space), text.substr(space + 1)};
    }
  }
  merges[i].fail("it isn't two tokens");
}

MergeTable read_merges(const JsonField& merges, const Vocabulary& vocabulary) {
  const std::size_t num_merges = merges.array().size();
  MergeTable table(num_merges);
  for (std::size_t i = 0; i < num_merges; ++i) {
    const auto [left, right] = merge_parts(merges, i);
    const auto left_bytes = from_byte_alphabet(left);
    const auto right_bytes = from_byte_alphabet(right);
    if (!left_bytes || !right_bytes) merges[i].fail("it isn't of the byte-level alphabet");
    const auto left_id = vocabulary.find_word(*left_bytes);
    const auto right_id = vocabulary.find_word(*right_bytes);
    const auto result = vocabulary.find_word(*left_bytes + *right_bytes);
    if (!left_id || !right_id || !result) {
      merges[i].fail("one of its tokens, or what they merge to, isn't in the vocabulary");
    }
    table.set(*left_id, *right_id, {static_cast<std::uint32_t>(i), *result});
  }
  return table;
}

void refuse(const JsonField& model, const std::string& key, bool is_harmless) {
  if (!is_harmless) model[key].fail("it is unsupported: only plain byte-level BPE is");
}

void check_plain(const JsonField& model) {
  const auto& type = model["type"];
  if (!type.is_null() && type.string() != "BPE") {
    type.fail("'" + type.string() + "' is unsupported: only BPE is");
  }
  const auto& dropout = model["dropout"].json();
  refuse(model, "dropout", dropout.is_null() || dropout == 0);
  refuse(model, "byte_fallback", !model["byte_fallback"].boolean_or(false));
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    refuse(model, key, model[key].is_null() || model[key].string().empty());
  }
}

Bpe read_bpe(const JsonField& model, const Vocabulary& vocabulary) {
  check_plain(model);
  Bpe bpe;
  bpe.merges = read_merges(model["merges"], vocabulary);
  bpe.fuse_unknown = model["fuse_unk"].boolean_or(false);
  bpe.ignore_merges = model["ignore_merges"].boolean_or(false);
  if (const JsonField unknown = model["unk_token"]; !unknown.is_null()) {
    bpe.unknown = vocabulary.find_text(unknown.string());
    if (!bpe.unknown) unknown.fail("it isn't in the vocabulary");
  }
  for (int byte = 0; byte < 256; ++byte) {
    const char text = static_cast<char>(byte);
    bpe.byte_ids[byte] = vocabulary.find_word({&text, 1});
  }
  return bpe;
}

// An added token whose text is in the vocabulary keeps that id; else it brings its own.
void give_id(const JsonField& field, TokenId id, const std::string& content, bool normalized,
             TokenizerModel& model) {
  if (const auto known = model.vocabulary.find_text(content)) {
    if (*known != id) field["id"].fail("the vocabulary has another id for '" + content + "'");
    return;
  }
  // A normalized token decodes to its normalized text (`tokenizers` added_vocabulary.rs).
  std::deque<std::string> storage;
  const std::string_view text =
      normalized ? model.normalizer.normalize(content, storage) : std::string_view(content);
  if (!model.vocabulary.add_unmatched(id, text)) field["id"].fail("another token has this id");
}

void read_added_token(const JsonField& field, TokenizerModel& model) {
  const TokenId id = field["id"].whole_number(Vocabulary::kMaxId);
  const std::string& content = field["content"].string();
  if (content.empty() || content.size() > AddedTokens::kMaxContentBytes) {
    field["content"].fail("it must have 1 to 1024 bytes");
  }
  if (!model.added_ids.emplace(content, id).second) field["content"].fail("it stands twice");
  const bool special = field["special"].boolean_or(false);
  const bool normalized = field["normalized"].boolean_or(!special);
  give_id(field, id, content, normalized, model);
  model.special[id] = special;

  std::deque<std::string> storage;
  const std::string_view sought =
      normalized ? model.normalizer.normalize(content, storage) : std::string_view(content);
  auto& tokens = normalized ? model.normalized_added : model.added;
  const bool is_new =
      tokens.add(sought, {id, special, field["single_word"].boolean_or(false),
                          field["lstrip"].boolean_or(false), field["rstrip"].boolean_or(false)});
  if (!is_new) field["content"].fail("another added token has the same text when normalized");
}

// bos_token and eos_token: a string, or an object that holds it as "content".
std::optional<TokenId> read_named_token(const JsonField& config, const std::string& key,
                                        const TokenizerModel& model) {
  JsonField field = config[key];
  if (field.json().is_object()) field = field["content"];
  if (field.is_null()) return std::nullopt;
  const auto id = model.find_token(field.string());
  if (!id) field.fail("'" + field.string() + "' isn't a token of tokenizer.json");
  return id;
}

}  // namespace

std::optional<TokenId> TokenizerModel::find_token(std::string_view text) const {
  const auto found = added_ids.find(std::string(text));
  if (found != added_ids.end()) return found->second;
  return vocabulary.find_text(text);
}

TokenizerModel read_tokenizer(std::string_view tokenizer_json, std::string_view config_json) {
  const nlohmann::json document = parse_file(tokenizer_json, kFile);
  const JsonField root(document, kFile);
  TokenizerModel model;
  model.normalizer = read_normalizer(root["normalizer"]);
  model.pre_tokenizer = read_pre_tokenizer(root["pre_tokenizer"]);
  check_decoder(root["decoder"]);
  model.vocabulary = read_vocabulary(root);
  model.bpe = read_bpe(root["model"], model.vocabulary);
  model.special.resize(model.vocabulary.size());
  if (const JsonField added = root["added_tokens"]; !added.is_null()) {
    for (const JsonField& token : added.elements()) read_added_token(token, model);
  }
  Surroundings around = read_post_processor(root["post_processor"], model.vocabulary);
  model.before = std::move(around.before);
  model.after = std::move(around.after);
  if (!config_json.empty()) {
    const nlohmann::json config = parse_file(config_json, kConfigFile);
    model.bos = read_named_token({config, kConfigFile}, "bos_token", model);
    model.eos = read_named_token({config, kConfigFile}, "eos_token", model);
  }
  return model;
}

}  // namespace foretoken::internal
