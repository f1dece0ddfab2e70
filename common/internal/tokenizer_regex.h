// Regex: a pattern of tokenizer.json, found by PCRE2 as `tokenizers` finds it by Oniguruma.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken::internal {

struct ByteRange {
  std::size_t begin;
  std::size_t end;
};

// Immutable once built: any thread may match. Patterns are compiled to machine code where the
// system allows it.
class Regex {
 public:
  enum class Syntax { kPattern, kLiteral };

  // Throws Exception(kModelFile) for a pattern that doesn't compile, or that has a construct with
  // another meaning in Oniguruma than in PCRE2 (the message names it).
  Regex(const std::string& pattern, Syntax syntax);

  // Replaces found by all matches, first to last, that don't overlap. An empty match right after a
  // match doesn't count.
  // REQUIRES: text is UTF-8. Error: kModelFile where the match limit is exceeded.
  Status find_all(std::string_view text, std::vector<ByteRange>& found) const;

 private:
  std::shared_ptr<const void> code_;  // a pcre2_code
};

}  // namespace foretoken::internal
