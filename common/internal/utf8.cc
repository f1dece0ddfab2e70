#include "common/internal/utf8.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace foretoken::internal {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// What a lead byte asks for (Unicode 15, table 3-7): how many bytes in all, and the range of the
// second one, which rules out overlong forms, surrogates and values past U+10FFFF.
struct Lead {
  std::size_t length;  // 0: no lead byte
  std::uint8_t second_min;
  std::uint8_t second_max;
};

Lead lead(std::uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// The length of the ASCII run at the start of text, in steps of 8 bytes.
std::size_t ascii_words(std::string_view text) {
  std::size_t length = 0;
  std::uint64_t word = 0;
  for (; length + sizeof(word) <= text.size(); length += sizeof(word)) {
    std::memcpy(&word, text.data() + length, sizeof(word));
    if ((word & 0x8080808080808080U) != 0) break;
  }
  return length;
}

enum class AtEnd { kReplaceCutOff, kLeaveCutOff };

std::size_t append_well_formed(std::string_view text, AtEnd at_end, std::string& out) {
  std::size_t done = 0;
  while (done < text.size()) {
    const std::size_t good = find_ill_formed_utf8(text.substr(done));
    out.append(text, done, good);
    done += good;
    if (done == text.size()) break;
    const Utf8Part part = first_utf8_part(text.substr(done));
    if (part.kind == Utf8Part::Kind::kCutOff && at_end == AtEnd::kLeaveCutOff) break;
    out.append(kReplacement);
    done += part.length;
  }
  return done;
}

}  // namespace

Utf8Part first_utf8_part(std::string_view text) {
  using Kind = Utf8Part::Kind;
  const auto byte = [text](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const Lead head = lead(byte(0));
  if (head.length == 0) return {1, Kind::kIllFormed};
  for (std::size_t i = 1; i < head.length; ++i) {
    if (i == text.size()) return {i, Kind::kCutOff};
    const std::uint8_t min = i == 1 ? head.second_min : 0x80;
    const std::uint8_t max = i == 1 ? head.second_max : 0xBF;
    if (byte(i) < min || byte(i) > max) return {i, Kind::kIllFormed};
  }
  return {head.length, Kind::kCharacter};
}

std::size_t find_ill_formed_utf8(std::string_view text) {
  std::size_t offset = 0;
  while (true) {
    offset += ascii_words(text.substr(offset));
    if (offset == text.size()) return offset;
    const Utf8Part part = first_utf8_part(text.substr(offset));
    if (part.kind != Utf8Part::Kind::kCharacter) return offset;
    offset += part.length;
  }
}

void append_lossy_utf8(std::string_view text, std::string& out) {
  append_well_formed(text, AtEnd::kReplaceCutOff, out);
}

std::size_t append_complete_utf8(std::string_view text, std::string& out) {
  return append_well_formed(text, AtEnd::kLeaveCutOff, out);
}

}  // namespace foretoken::internal
