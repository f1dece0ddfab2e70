#include "common/internal/tokenizer_added.h"

#include <unicode/uchar.h>
#include <unicode/utf8.h>

#include <algorithm>

#include "common/check.h"

namespace foretoken::internal {
namespace {

// \w of Rust's regex crate: UTS 18, Annex C.
bool is_word_character(UChar32 c) {
  return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL) ||
         (U_GET_GC_MASK(c) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0;
}

// Where the run of accepted characters from offset on ends, and where the one up to offset starts.
template <typename Accepts>
std::size_t end_of_run(std::string_view text, std::size_t offset, Accepts accepts) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
  while (offset < text.size()) {
    std::size_t next = offset;
    UChar32 c = 0;
    U8_NEXT_UNSAFE(bytes, next, c);
    if (!accepts(c)) break;
    offset = next;
  }
  return offset;
}

template <typename Accepts>
std::size_t start_of_run(std::string_view text, std::size_t offset, Accepts accepts) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
  while (offset > 0) {
    std::size_t previous = offset;
    UChar32 c = 0;
    U8_PREV_UNSAFE(bytes, previous, c);
    if (!accepts(c)) break;
    offset = previous;
  }
  return offset;
}

bool is_white_space(UChar32 c) { return u_isUWhiteSpace(c) != 0; }

// Whether no word goes on before begin or after end.
bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
  UChar32 before = 0;
  UChar32 after = 0;
  if (begin > 0) U8_PREV_UNSAFE(bytes, begin, before);
  if (end < text.size()) U8_NEXT_UNSAFE(bytes, end, after);
  return !is_word_character(before) && !is_word_character(after);
}

}  // namespace

std::uint64_t AddedTokens::edge(std::size_t node, char byte) {
  return std::uint64_t{node} << 8 | static_cast<std::uint8_t>(byte);
}

bool AddedTokens::add(std::string_view content, const AddedToken& token) {
  FT_CHECK(!content.empty() && content.size() <= kMaxContentBytes, content.size());
  std::size_t node = 0;
  for (const char byte : content) {
    const auto next = static_cast<std::uint32_t>(nodes_.size());
    const auto [found, is_new] = edges_.emplace(edge(node, byte), next);
    if (is_new) nodes_.emplace_back();
    node = found->second;
  }
  if (nodes_[node].token) return false;
  nodes_[node].token = static_cast<std::uint32_t>(tokens_.size());
  tokens_.push_back(token);
  first_bytes_[static_cast<std::uint8_t>(content[0])] = true;
  return true;
}

std::optional<AddedTokens::Match> AddedTokens::longest_at(std::string_view text,
                                                          std::size_t begin) const {
  std::optional<Match> match;
  std::size_t node = 0;
  for (std::size_t i = begin; i < text.size(); ++i) {
    const auto found = edges_.find(edge(node, text[i]));
    if (found == edges_.end()) break;
    node = found->second;
    if (nodes_[node].token) match = Match{i + 1, &tokens_[*nodes_[node].token]};
  }
  return match;
}

// `tokenizers` tokenizer/added_vocabulary.rs, find_matches.
void AddedTokens::find(std::string_view text, bool special, std::vector<AddedSplit>& splits) const {
  splits.clear();
  std::size_t done = 0;
  for (std::size_t i = 0; i < text.size() && !tokens_.empty();) {
    std::optional<Match> match;
    if (first_bytes_[static_cast<std::uint8_t>(text[i])]) match = longest_at(text, i);
    if (!match) {
      ++i;
      continue;
    }
    const AddedToken& token = *match->token;
    std::size_t begin = i;
    std::size_t end = match->end;
    i = end;
    if (token.special && !special) continue;
    if (token.single_word && !stands_alone(text, begin, end)) continue;
    if (token.lstrip) begin = std::max(start_of_run(text, begin, is_white_space), done);
    if (token.rstrip) end = end_of_run(text, end, is_white_space);
    if (done < begin) splits.push_back({done, begin, std::nullopt});
    splits.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) splits.push_back({done, text.size(), std::nullopt});
}

}  // namespace foretoken::internal
