#include "common/internal/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <optional>

#include "common/internal/tokenizer_unicode.h"
#include "common/internal/utf8.h"

namespace foretoken::internal {
namespace {

// Bounds for one match. PCRE2 counts backtracking points; the patterns of known models need at
// most one a byte of text.
constexpr std::uint32_t kMatchLimit = 10'000'000;
constexpr std::uint32_t kHeapLimitKib = 64 * 1024;
constexpr std::size_t kMaxPatternBytes = 64 * 1024;
constexpr std::uint32_t kMaxGroupDepth = 100;

PCRE2_SPTR units(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

std::string pcre2_message(int error) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

bool is_general_category(std::string_view name) {
  constexpr auto kNames = std::to_array<std::string_view>(
      {"L",  "M",  "N",  "P",  "S",  "Z",  "C",  "Lu", "Ll", "Lt", "Lm", "Lo", "Mn",
       "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
       "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn"});
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

// The escape at pattern[i], after the backslash: what it is called if the two engines may
// disagree about it. Moves i past it.
std::optional<std::string> foreign_escape(std::string_view pattern, std::size_t& i) {
  const char kind = i < pattern.size() ? pattern[i++] : '\\';
  if (kind == 'p' || kind == 'P') {
    const std::size_t close = pattern.find('}', i);
    if (i < pattern.size() && pattern[i] == '{' && close != std::string_view::npos &&
        is_general_category(pattern.substr(i + 1, close - i - 1))) {
      i = close + 1;
      return std::nullopt;
    }
    return std::string("\\") + kind + " with other than a general category";
  }
  if (kind == 'x') return std::nullopt;
  constexpr std::string_view kShared = "sSdDnrtfvae";
  const bool is_letter_or_digit = std::isalnum(static_cast<unsigned char>(kind)) != 0;
  if (!is_letter_or_digit || kShared.find(kind) != std::string_view::npos) return std::nullopt;
  return std::string("\\") + kind;
}

// The first construct of a pattern that Oniguruma and PCRE2 may read in different ways.
std::optional<std::string> foreign_construct(std::string_view pattern) {
  bool in_class = false;
  for (std::size_t i = 0; i < pattern.size();) {
    const char c = pattern[i++];
    const std::string_view rest = pattern.substr(i);
    if (c == '\\') {
      if (auto escape = foreign_escape(pattern, i)) return escape;
    } else if (in_class) {
      if (c == '[') return "[ inside a class";
      if (c == '&' && rest.starts_with('&')) return "&& inside a class";
      in_class = c != ']';
    } else if (c == '[') {
      in_class = true;
      if (rest.starts_with('^')) ++i;
      if (pattern.substr(i).starts_with(']')) return "] first in a class";
    } else if (c == '}' && rest.starts_with('+')) {
      return "}+";
    } else if (c == '(' && rest.starts_with('?')) {
      constexpr std::array<std::string_view, 8> kShared = {
          "?:", "?=", "?!", "?<=", "?<!", "?>", "?i:", "?i)"};
      bool shared = false;
      for (const auto start : kShared) shared = shared || rest.starts_with(start);
      if (!shared) return std::string(pattern.substr(i - 1, 4));
    } else if (c == '(' && rest.starts_with('*')) {
      return "(*";
    }
  }
  return std::nullopt;
}

struct FreeMatchData {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct FreeMatchContext {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

// What a match needs beside the code: one of each a thread.
struct MatchSpace {
  std::unique_ptr<pcre2_match_data, FreeMatchData> data{pcre2_match_data_create(1, nullptr)};
  std::unique_ptr<pcre2_match_context, FreeMatchContext> context{
      pcre2_match_context_create(nullptr)};
  std::string newer_replaced;

  MatchSpace() {
    pcre2_set_match_limit(context.get(), kMatchLimit);
    pcre2_set_heap_limit(context.get(), kHeapLimitKib);
  }
};

MatchSpace& match_space() {
  thread_local MatchSpace space;
  return space;
}

}  // namespace

Regex::Regex(const std::string& pattern, Syntax syntax) {
  const auto fail = [&pattern](const std::string& why) {
    throw Exception(ErrorCode::kModelFile,
                    "pattern \"" + pattern.substr(0, 200) + "\" is unsupported: " + why);
  };
  if (pattern.size() > kMaxPatternBytes) fail("longer than 64 KiB");
  std::uint32_t options = PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C;
  if (syntax == Syntax::kLiteral) {
    options = PCRE2_UTF | PCRE2_LITERAL;
  } else {
    if (const auto construct = foreign_construct(pattern)) fail(*construct);
    options |= PCRE2_UCP | PCRE2_MULTILINE;  // ^ and $ match at lines, as in Oniguruma
  }
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  pcre2_set_parens_nest_limit(context.get(), kMaxGroupDepth);
  int error = 0;
  std::size_t offset = 0;
  pcre2_code* code =
      pcre2_compile(units(pattern), pattern.size(), options, &error, &offset, context.get());
  if (code == nullptr) fail(pcre2_message(error) + " at byte " + std::to_string(offset));
  code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  // Where the system forbids it, pcre2_match interprets: slower, with the same matches.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
}

Status Regex::find_all(std::string_view text, std::vector<ByteRange>& found) const {
  found.clear();
  MatchSpace& space = match_space();
  if (replace_newer_characters(text, space.newer_replaced)) text = space.newer_replaced;
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::size_t* range = pcre2_get_ovector_pointer(space.data.get());

  for (std::size_t from = 0; from <= text.size();) {
    std::uint32_t options = PCRE2_NO_UTF_CHECK;
    int count = pcre2_match(code, units(text), text.size(), from, options, space.data.get(),
                            space.context.get());
    if (count == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter has more room
      options |= PCRE2_NO_JIT;
      count = pcre2_match(code, units(text), text.size(), from, options, space.data.get(),
                          space.context.get());
    }
    if (count == PCRE2_ERROR_NOMATCH) break;
    if (count < 0) {
      return Error{ErrorCode::kModelFile,
                   "a pattern of tokenizer.json failed on this text: " + pcre2_message(count)};
    }
    const ByteRange match{range[0], range[1]};
    if (match.begin == match.end && !found.empty() && found.back().end == match.end) {
      if (match.end == text.size()) break;
      from = match.end + first_utf8_part(text.substr(match.end)).length;
    } else {
      found.push_back(match);
      from = match.end;
    }
  }
  return Ok{};
}

}  // namespace foretoken::internal
