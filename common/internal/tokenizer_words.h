// PreTokenizer: cuts a text into the words that BPE works on, one stage after the other. Each stage
// sees each piece of the stage before alone, so that no pattern looks past a piece's borders.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "common/internal/tokenizer_regex.h"
#include "common/result.h"

namespace foretoken::internal {

// What happens to a match, as `tokenizers` names it (SplitDelimiterBehavior).
enum class SplitBehavior {
  kRemoved,
  kIsolated,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous,
};

struct SplitStage {
  Regex regex;
  SplitBehavior behavior;
  bool invert;  // what lies between matches counts as the matches
};
struct DigitsStage {
  bool individual;  // each digit alone, or runs of digits
};
struct ByteLevelStage {
  bool add_prefix_space;       // before each piece that has none
  std::optional<Regex> regex;  // GPT-2's pattern, where use_regex is set
};
using WordStage = std::variant<SplitStage, DigitsStage, ByteLevelStage>;

// GPT-2's pattern (openai/gpt-2, src/encoder.py).
const std::string& gpt2_pattern();

class PreTokenizer {
 public:
  explicit PreTokenizer(std::vector<WordStage> stages = {}) : stages_(std::move(stages)) {}

  // Replaces words by the non-empty words of text, in order: views into text or into storage.
  // REQUIRES: text is UTF-8. Error: kModelFile where a pattern exceeds its match limit.
  Status split(std::string_view text, std::vector<std::string_view>& words,
               std::deque<std::string>& storage) const;

 private:
  std::vector<WordStage> stages_;
};

}  // namespace foretoken::internal
