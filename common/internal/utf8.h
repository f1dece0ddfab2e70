// UTF-8: validation, and the replacement of what is ill-formed.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace foretoken::internal {

// The bytes at the start of a text that belong together: a character, or the maximal subpart of
// an ill-formed one (Unicode 15, section 3.9: what one U+FFFD replaces).
struct Utf8Part {
  std::size_t length;  // 1 to 4 for a character, 1 to 3 for an ill-formed part
  enum class Kind { kCharacter, kIllFormed, kCutOff } kind;  // kCutOff: the text ends inside it
};

// REQUIRES: !text.empty().
Utf8Part first_utf8_part(std::string_view text);

// The offset of the first ill-formed byte; text.size() where there is none.
std::size_t find_ill_formed_utf8(std::string_view text);

// Appends text with U+FFFD for each ill-formed part.
void append_lossy_utf8(std::string_view text, std::string& out);

// As append_lossy_utf8, but leaves off a part that the end of text cuts off. Returns how many
// bytes were consumed: text.size() less at most 3.
std::size_t append_complete_utf8(std::string_view text, std::string& out);

}  // namespace foretoken::internal
