#include "common/internal/tokenizer_bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "common/check.h"

namespace foretoken::internal {
namespace {

constexpr std::uint64_t kNoPair = ~std::uint64_t{0};
constexpr std::uint32_t kNoRank = ~std::uint32_t{0};

// Up to this many bytes a scan for the best pair beats a heap (docs/measurements.md, "Tokenizer").
constexpr std::size_t kMaxScanBytes = 48;

constexpr std::size_t kMaxCachedWords = 1 << 13;
constexpr std::size_t kMaxCachedBytes = 64;

std::uint64_t pair_of(TokenId left, TokenId right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

}  // namespace

MergeTable::MergeTable(std::size_t max_merges) {
  const std::size_t num_slots = std::bit_ceil(std::max<std::size_t>(2, max_merges * 3 / 2));
  slots_.assign(num_slots, Slot{kNoPair, {}});
  shift_ = 64 - std::countr_zero(num_slots);
}

// The slot that holds pair, or the free one where it belongs: there always is a free one.
std::size_t MergeTable::slot_of(std::uint64_t pair) const {
  std::size_t slot = (pair ^ pair >> 29) * 0x9E3779B97F4A7C15U >> shift_;  // Fibonacci hashing
  while (slots_[slot].pair != pair && slots_[slot].pair != kNoPair) {
    slot = (slot + 1) & (slots_.size() - 1);
  }
  return slot;
}

void MergeTable::set(TokenId left, TokenId right, Merge merge) {
  const std::uint64_t pair = pair_of(left, right);
  slots_[slot_of(pair)] = {pair, merge};
}

const Merge* MergeTable::find(TokenId left, TokenId right) const {
  const Slot& slot = slots_[slot_of(pair_of(left, right))];
  return slot.pair == kNoPair ? nullptr : &slot.merge;
}

WordEncoder::WordEncoder(const Bpe& bpe, const Vocabulary& vocabulary, std::size_t text_bytes)
    : bpe_(bpe),
      vocabulary_(vocabulary),
      cache_(std::bit_ceil(std::clamp<std::size_t>(text_bytes / 4, 1, kMaxCachedWords))) {}

void WordEncoder::encode(std::string_view word, std::vector<TokenId>& out) {
  if (word.size() > kMaxCachedBytes) return encode_uncached(word, out);
  CachedWord& cached = cache_[std::hash<std::string_view>{}(word) & (cache_.size() - 1)];
  if (cached.word == word) {
    for (std::size_t i = 0; i < cached.num_ids; ++i) out.push_back(out[cached.first_id + i]);
    return;
  }
  const std::size_t first_id = out.size();
  encode_uncached(word, out);
  cached = {word, first_id, out.size() - first_id};
}

void WordEncoder::encode_uncached(std::string_view word, std::vector<TokenId>& out) {
  if (bpe_.ignore_merges) {
    if (const auto id = vocabulary_.find_word(word)) {
      out.push_back(*id);
      return;
    }
  }
  if (word.size() <= kMaxScanBytes) {
    merge_by_scan(word, out);
  } else {
    merge_by_heap(word, out);
  }
}

// One symbol a byte, into ids_.
void WordEncoder::start_symbols(std::string_view word) {
  ids_.clear();
  bool after_unknown = false;
  for (const char byte : word) {
    const auto& id = bpe_.byte_ids[static_cast<std::uint8_t>(byte)];
    if (id) {
      ids_.push_back(*id);
    } else if (bpe_.unknown && !(after_unknown && bpe_.fuse_unknown)) {
      ids_.push_back(*bpe_.unknown);
    }
    after_unknown = !id;
  }
}

// O(n^2) with a small constant: keeps each neighbour pair's rank beside its left symbol.
void WordEncoder::merge_by_scan(std::string_view word, std::vector<TokenId>& out) {
  start_symbols(word);
  const auto rank_at = [this](std::size_t left) {
    if (left + 1 >= ids_.size()) return kNoRank;
    const Merge* merge = bpe_.merges.find(ids_[left], ids_[left + 1]);
    return merge != nullptr ? merge->rank : kNoRank;
  };
  ranks_.clear();
  for (std::size_t i = 0; i < ids_.size(); ++i) ranks_.push_back(rank_at(i));

  while (!ids_.empty()) {
    const auto best = std::min_element(ranks_.begin(), ranks_.end());  // the leftmost of equals
    if (*best == kNoRank) break;
    const auto left = static_cast<std::size_t>(best - ranks_.begin());
    ids_[left] = bpe_.merges.find(ids_[left], ids_[left + 1])->result;
    ids_.erase(ids_.begin() + static_cast<std::ptrdiff_t>(left) + 1);
    ranks_.erase(ranks_.begin() + static_cast<std::ptrdiff_t>(left) + 1);
    ranks_[left] = rank_at(left);
    if (left > 0) ranks_[left - 1] = rank_at(left - 1);
  }
  out.insert(out.end(), ids_.begin(), ids_.end());
}

// O(n log n): a heap of candidate merges over a linked list of symbols. A candidate whose symbols
// have changed since is recognized when it comes up, and skipped.
void WordEncoder::merge_by_heap(std::string_view word, std::vector<TokenId>& out) {
  start_symbols(word);
  FT_CHECK(ids_.size() < static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()));
  const auto num_symbols = static_cast<std::int32_t>(ids_.size());
  symbols_.clear();
  for (std::int32_t i = 0; i < num_symbols; ++i) {
    symbols_.push_back({ids_[i], i - 1, i + 1 < num_symbols ? i + 1 : -1, false});
  }
  heap_.clear();
  for (std::int32_t i = 0; i < num_symbols; ++i) push_candidate(i);

  const auto later = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
  };
  std::make_heap(heap_.begin(), heap_.end(), later);
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    const Candidate top = heap_.back();
    heap_.pop_back();
    Symbol& left = symbols_[top.left];
    if (left.merged_away || left.next < 0) continue;
    Symbol& right = symbols_[left.next];
    const Merge* merge = bpe_.merges.find(left.id, right.id);
    if (merge == nullptr || merge->result != top.result) continue;

    left.id = top.result;
    left.next = right.next;
    right.merged_away = true;
    if (right.next >= 0) symbols_[right.next].previous = top.left;
    for (const std::int32_t i : {left.previous, top.left}) {
      const std::size_t num_before = heap_.size();
      if (i >= 0) push_candidate(i);
      if (heap_.size() > num_before) std::push_heap(heap_.begin(), heap_.end(), later);
    }
  }
  for (std::int32_t i = num_symbols > 0 ? 0 : -1; i >= 0; i = symbols_[i].next) {
    out.push_back(symbols_[i].id);
  }
}

// Adds the merge of symbol `left` with its next one, if there is one, at the end of heap_.
void WordEncoder::push_candidate(std::int32_t left) {
  const std::int32_t right = symbols_[left].next;
  if (right < 0) return;
  const Merge* merge = bpe_.merges.find(symbols_[left].id, symbols_[right].id);
  if (merge != nullptr) heap_.push_back({merge->rank, left, merge->result});
}

}  // namespace foretoken::internal
