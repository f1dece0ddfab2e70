#include "common/internal/tokenizer_vocabulary.h"

#include <array>
#include <cstdint>
#include <utility>

#include "common/check.h"

namespace foretoken::internal {
namespace {

// GPT-2's bytes_to_unicode (openai/gpt-2, src/encoder.py): printable bytes stand for themselves,
// the others, in order, for U+0100, U+0101, ...: kAlphabetSize code points in all, gaps included.
constexpr std::size_t kAlphabetSize = 0x144;

constexpr bool stands_for_itself(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr std::array<std::int16_t, kAlphabetSize> make_alphabet() {
  std::array<std::int16_t, kAlphabetSize> bytes{};
  for (auto& byte : bytes) byte = -1;
  int next = 0x100;
  for (int byte = 0; byte < 0x100; ++byte) {
    bytes[stands_for_itself(byte) ? byte : next++] = static_cast<std::int16_t>(byte);
  }
  return bytes;
}

constexpr auto kByteOfCodePoint = make_alphabet();  // -1: a code point of no byte

std::optional<TokenId> find_in(const std::unordered_map<std::string_view, TokenId>& map,
                               std::string_view key) {
  const auto found = map.find(key);
  if (found == map.end()) return std::nullopt;
  return found->second;
}

}  // namespace

std::optional<std::string> from_byte_alphabet(std::string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::size_t code_point = static_cast<std::uint8_t>(text[i]);
    if (code_point >= 0x80) {  // the alphabet ends at U+0143, so two UTF-8 bytes suffice
      if (code_point < 0xC2 || code_point > 0xC5 || i + 1 == text.size()) return std::nullopt;
      code_point = (code_point & 0x1F) << 6 | (static_cast<std::uint8_t>(text[++i]) & 0x3F);
    }
    if (code_point >= kAlphabetSize || kByteOfCodePoint[code_point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kByteOfCodePoint[code_point]));
  }
  return bytes;
}

Vocabulary::Vocabulary(TokenId max_id) {
  FT_CHECK(max_id >= 0 && max_id <= kMaxId, max_id);
  tokens_.resize(static_cast<std::size_t>(max_id) + 1);
  words_.reserve(tokens_.size());
}

bool Vocabulary::add(TokenId id, std::string_view text) {
  auto bytes = from_byte_alphabet(text);
  auto& map = bytes ? words_ : others_;
  if (!place(id, bytes ? std::move(*bytes) : std::string(text))) return false;
  map.emplace(tokens_[id].bytes, id);
  return true;
}

bool Vocabulary::add_unmatched(TokenId id, std::string_view text) {
  auto bytes = from_byte_alphabet(text);
  return place(id, bytes ? std::move(*bytes) : std::string(text));
}

bool Vocabulary::place(TokenId id, std::string bytes) {
  Token& token = tokens_.at(static_cast<std::size_t>(id));
  if (token.used) return false;
  token = {true, std::move(bytes)};
  return true;
}

std::optional<TokenId> Vocabulary::find_text(std::string_view text) const {
  if (const auto bytes = from_byte_alphabet(text)) return find_in(words_, *bytes);
  return find_in(others_, text);
}

std::optional<TokenId> Vocabulary::find_word(std::string_view bytes) const {
  return find_in(words_, bytes);
}

std::string_view Vocabulary::bytes(TokenId id) const {
  if (id < 0 || static_cast<std::size_t>(id) >= tokens_.size()) return {};
  return tokens_[static_cast<std::size_t>(id)].bytes;
}

}  // namespace foretoken::internal
