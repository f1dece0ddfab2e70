// The Unicode that patterns see: version 16, as Oniguruma in `tokenizers` 0.23 does, whichever
// version PCRE2 was built with (Debian 12: version 14).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace foretoken::internal {

// Replaces each character whose general category changed between Unicode 14 and 16 (newly assigned
// ones), by one of the same category and UTF-8 length that is older; and U+180E, which is a space
// for PCRE2 alone, by U+200B. A pattern then finds the same offsets in either text.
// Returns whether text had any; if not, out is left alone. REQUIRES: text is UTF-8.
bool replace_newer_characters(std::string_view text, std::string& out);

// Rust's char::is_numeric: general category N, Unicode 17. `size` receives the character's bytes.
// REQUIRES: text is UTF-8 and offset < text.size(), at a character's start.
bool is_numeric_at(std::string_view text, std::size_t offset, std::size_t& size);

}  // namespace foretoken::internal
