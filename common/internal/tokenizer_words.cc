#include "common/internal/tokenizer_words.h"

#include "common/internal/tokenizer_unicode.h"

namespace foretoken::internal {
namespace {

// A piece of a text: a match, or what lies between two.
struct Piece {
  ByteRange range;
  bool is_match;
};

// One stage at work: takes pieces of the stage before, collects its own.
struct Cutter {
  std::vector<std::string_view>& words;
  std::deque<std::string>& storage;
  std::vector<ByteRange> matches;
  std::vector<Piece> pieces;

  Status apply(const SplitStage& stage, std::string_view text);
  Status apply(const DigitsStage& stage, std::string_view text);
  Status apply(const ByteLevelStage& stage, std::string_view text);

 private:
  void matches_to_pieces(std::size_t text_bytes);
  void emit(std::string_view text, SplitBehavior behavior);
  void emit_merged_with_next(std::string_view text);
  void add_word(std::string_view text, ByteRange range) {
    if (range.end > range.begin) {
      words.push_back(text.substr(range.begin, range.end - range.begin));
    }
  }
};

// The pieces cover the text: `tokenizers` tokenizer/pattern.rs, find_matches.
void Cutter::matches_to_pieces(std::size_t text_bytes) {
  pieces.clear();
  std::size_t done = 0;
  for (const ByteRange& match : matches) {
    if (done != match.begin) pieces.push_back({{done, match.begin}, false});
    pieces.push_back({match, true});
    done = match.end;
  }
  if (done != text_bytes) pieces.push_back({{done, text_bytes}, false});
}

// `tokenizers` tokenizer/normalizer.rs, NormalizedString::split.
void Cutter::emit(std::string_view text, SplitBehavior behavior) {
  if (behavior == SplitBehavior::kMergedWithNext) return emit_merged_with_next(text);
  std::optional<ByteRange> word;
  bool after_match = false;
  for (const Piece& piece : pieces) {
    bool joins = false;
    if (behavior == SplitBehavior::kContiguous) joins = piece.is_match == after_match;
    if (behavior == SplitBehavior::kMergedWithPrevious) joins = piece.is_match && !after_match;
    after_match = piece.is_match;
    if (joins && word) {
      word->end = piece.range.end;
      continue;
    }
    if (word) add_word(text, *word);
    word = piece.range;
    if (behavior == SplitBehavior::kRemoved && piece.is_match) word.reset();
  }
  if (word) add_word(text, *word);
}

// From the end to the start: a match joins the piece after it, unless that is a match too.
void Cutter::emit_merged_with_next(std::string_view text) {
  std::vector<ByteRange> reversed;
  bool before_match = false;
  for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
    if (piece->is_match && !before_match && !reversed.empty()) {
      reversed.back().begin = piece->range.begin;
    } else {
      reversed.push_back(piece->range);
    }
    before_match = piece->is_match;
  }
  for (auto range = reversed.rbegin(); range != reversed.rend(); ++range) add_word(text, *range);
}

Status Cutter::apply(const SplitStage& stage, std::string_view text) {
  FT_RETURN_IF_ERROR(stage.regex.find_all(text, matches));
  matches_to_pieces(text.size());
  if (stage.invert) {
    for (Piece& piece : pieces) piece.is_match = !piece.is_match;
  }
  emit(text, stage.behavior);
  return Ok{};
}

Status Cutter::apply(const DigitsStage& stage, std::string_view text) {
  matches.clear();
  std::size_t size = 0;
  for (std::size_t i = 0; i < text.size(); i += size) {
    if (is_numeric_at(text, i, size)) matches.push_back({i, i + size});
  }
  matches_to_pieces(text.size());
  emit(text, stage.individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous);
  return Ok{};
}

Status Cutter::apply(const ByteLevelStage& stage, std::string_view text) {
  if (stage.add_prefix_space && !text.starts_with(' ')) {
    text = storage.emplace_back(" ").append(text);
  }
  if (!stage.regex) {
    words.push_back(text);
    return Ok{};
  }
  FT_RETURN_IF_ERROR(stage.regex->find_all(text, matches));
  matches_to_pieces(text.size());
  emit(text, SplitBehavior::kIsolated);
  return Ok{};
}

}  // namespace

const std::string& gpt2_pattern() {
  static const std::string pattern =
      R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
  return pattern;
}

Status PreTokenizer::split(std::string_view text, std::vector<std::string_view>& words,
                           std::deque<std::string>& storage) const {
  words.clear();
  if (!text.empty()) words.push_back(text);
  std::vector<std::string_view> pieces;
  Cutter cutter{words, storage, {}, {}};
  for (const WordStage& stage : stages_) {
    pieces.swap(words);
    words.clear();
    for (const std::string_view piece : pieces) {
      FT_RETURN_IF_ERROR(
          std::visit([&](const auto& kind) { return cutter.apply(kind, piece); }, stage));
    }
  }
  return Ok{};
}

}  // namespace foretoken::internal
