#include "common/internal/tokenizer_components.h"

#include <array>
#include <string>
#include <utility>

#include "common/result.h"

namespace foretoken::internal {
namespace {

[[noreturn]] void fail_unsupported(const JsonField& field, const std::string& supported) {
  field["type"].fail("'" + field.type() + "' is unsupported; these are: " + supported);
}

SplitBehavior read_behavior(const JsonField& field) {
  constexpr std::array<std::pair<const char*, SplitBehavior>, 5> kBehaviors = {{
      {"Removed", SplitBehavior::kRemoved},
      {"Isolated", SplitBehavior::kIsolated},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous},
  }};
  for (const auto& [name, behavior] : kBehaviors) {
    if (field.string() == name) return behavior;
  }
  field.fail("'" + field.string() + "' is no behavior of Split");
}

Regex read_pattern(const JsonField& field) {
  const bool literal = !field["String"].is_null();
  const JsonField text = field[literal ? "String" : "Regex"];
  try {
    return Regex(text.string(), literal ? Regex::Syntax::kLiteral : Regex::Syntax::kPattern);
  } catch (const Exception& exception) {
    text.fail(exception.error().message);
  }
}

ByteLevelStage read_byte_level(const JsonField& field) {
  ByteLevelStage stage{field["add_prefix_space"].boolean(), std::nullopt};
  if (field["use_regex"].boolean_or(true)) {
    stage.regex.emplace(gpt2_pattern(), Regex::Syntax::kPattern);
  }
  return stage;
}

void append_stages(const JsonField& field, std::vector<WordStage>& stages) {
  const std::string& type = field.type();
  if (!stages.empty() && std::holds_alternative<ByteLevelStage>(stages.back())) {
    field.fail("a pre-tokenizer after ByteLevel is unsupported");
  }
  if (type == "Sequence") {
    for (const JsonField& part : field["pretokenizers"].elements()) append_stages(part, stages);
  } else if (type == "Split") {
    stages.emplace_back(SplitStage{read_pattern(field["pattern"]), read_behavior(field["behavior"]),
                                   field["invert"].boolean()});
  } else if (type == "Digits") {
    stages.emplace_back(DigitsStage{field["individual_digits"].boolean()});
  } else if (type == "ByteLevel") {
    stages.emplace_back(read_byte_level(field));
  } else {
    fail_unsupported(field, "Sequence, Split, Digits, ByteLevel");
  }
}

// The ids that a template's piece {"SpecialToken": {"id": name}} stands for.
std::vector<TokenId> read_template_token(const JsonField& piece, const JsonField& special_tokens,
                                         const Vocabulary& vocabulary) {
  std::vector<TokenId> ids;
  const std::string& name = piece["SpecialToken"]["id"].string();
  for (const JsonField& id : special_tokens[name]["ids"].elements()) {
    ids.push_back(id.whole_number(static_cast<int>(vocabulary.size()) - 1));
  }
  return ids;
}

Surroundings read_template(const JsonField& field, const Vocabulary& vocabulary) {
  Surroundings result;
  bool after_text = false;
  for (const JsonField& piece : field["single"].elements()) {
    if (!piece["SpecialToken"].is_null()) {
      auto& side = after_text ? result.after : result.before;
      const auto ids = read_template_token(piece, field["special_tokens"], vocabulary);
      side.insert(side.end(), ids.begin(), ids.end());
      continue;
    }
    const JsonField sequence = piece["Sequence"]["id"];
    if (sequence.string() != "A" || after_text) sequence.fail("it must be A, and only once");
    after_text = true;
  }
  if (!after_text) field["single"].fail("it lacks the sequence A");
  return result;
}

}  // namespace

Normalizer read_normalizer(const JsonField& field) {
  if (field.is_null()) return Normalizer(Normalizer::Kind::kNone);
  if (field.type() == "NFC") return Normalizer(Normalizer::Kind::kNfc);
  if (field.type() != "Sequence") fail_unsupported(field, "Sequence, NFC");
  Normalizer result(Normalizer::Kind::kNone);
  for (const JsonField& part : field["normalizers"].elements()) {
    // NFC twice is NFC, so any NFC among them decides.
    const Normalizer normalizer = read_normalizer(part);
    if (normalizer.kind() != Normalizer::Kind::kNone) result = normalizer;
  }
  return result;
}

PreTokenizer read_pre_tokenizer(const JsonField& field) {
  std::vector<WordStage> stages;
  if (!field.is_null()) append_stages(field, stages);
  if (stages.empty() || !std::holds_alternative<ByteLevelStage>(stages.back())) {
    field.fail("it must end with ByteLevel: only byte-level models are supported");
  }
  return PreTokenizer(std::move(stages));
}

void check_decoder(const JsonField& field) {
  if (field.is_null() || field.type() != "ByteLevel") {
    field.fail("it must be ByteLevel: only byte-level models are supported");
  }
}

Surroundings read_post_processor(const JsonField& field, const Vocabulary& vocabulary) {
  if (field.is_null() || field.type() == "ByteLevel") return {};
  if (field.type() == "TemplateProcessing") return read_template(field, vocabulary);
  if (field.type() != "Sequence") {
    fail_unsupported(field, "Sequence, TemplateProcessing, ByteLevel");
  }
  Surroundings result;
  for (const JsonField& part : field["processors"].elements()) {
    Surroundings outer = read_post_processor(part, vocabulary);
    outer.before.insert(outer.before.end(), result.before.begin(), result.before.end());
    result.before = std::move(outer.before);
    result.after.insert(result.after.end(), outer.after.begin(), outer.after.end());
  }
  return result;
}

}  // namespace foretoken::internal
