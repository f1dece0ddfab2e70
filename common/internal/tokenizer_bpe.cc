#include "common/internal/tokenizer_bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "common/check.h"

namespace foretoken::internal {
namespace {

constexpr std::uint64_t kNoPair = ~std::uint64_t{0};

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
  start_symbols(word);
  merge_symbols();
  for (std::int32_t i = symbols_.empty() ? -1 : 0; i >= 0; i = symbols_[i].next) {
    out.push_back(symbols_[i].id);
  }
}

// One symbol a byte.
void WordEncoder::start_symbols(std::string_view word) {
  FT_CHECK(word.size() < static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()));
  symbols_.clear();
  const auto add = [this](TokenId id) {
    const auto index = static_cast<std::int32_t>(symbols_.size());
    if (index > 0) symbols_.back().next = index;
    symbols_.push_back({id, index - 1, -1, false});
  };
  bool after_unknown = false;
  for (const char byte : word) {
    const auto& id = bpe_.byte_ids[static_cast<std::uint8_t>(byte)];
    if (id) {
      add(*id);
    } else if (bpe_.unknown && !(after_unknown && bpe_.fuse_unknown)) {
      add(*bpe_.unknown);
    }
    after_unknown = !id;
  }
}

// O(n log n): a heap of candidate merges over a linked list of symbols. A candidate whose symbols
// have changed since is recognized when it comes up, and skipped.
void WordEncoder::merge_symbols() {
  heap_.clear();
  for (std::size_t i = 0; i < symbols_.size(); ++i) push_candidate(static_cast<std::int32_t>(i));

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
}

// Adds the merge of symbol `left` with its next one, if there is one, at the end of heap_.
void WordEncoder::push_candidate(std::int32_t left) {
  const std::int32_t right = symbols_[left].next;
  if (right < 0) return;
  const Merge* merge = bpe_.merges.find(symbols_[left].id, symbols_[right].id);
  if (merge != nullptr) heap_.push_back({merge->rank, left, merge->result});
}

}  // namespace foretoken::internal
