// Bpe: a word's bytes to token ids, by merging neighbours in the order of the merge list.
//
// Starts with one symbol a byte, then merges again and again the pair that comes first in the
// list, the leftmost of equal ones (Sennrich et al. 2016, section 3.2; `tokenizers`
// models/bpe/word.rs, merge_all). A byte without a token is dropped, or is unk_token where the
// model names one.
//
// Bpe is immutable once built. WordEncoder is one thread's scratch space and cache.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "common/ids.h"
#include "common/internal/tokenizer_vocabulary.h"

namespace foretoken::internal {

// What two neighbours become. A lower rank merges first.
struct Merge {
  std::uint32_t rank;
  TokenId result;
};

// A fixed table of pair -> Merge: open addressing, since unordered_map's chains cost a cache miss
// more a look-up.
class MergeTable {
 public:
  explicit MergeTable(std::size_t max_merges);
  // A pair that was set before gets the new value. REQUIRES: at most max_merges pairs.
  void set(TokenId left, TokenId right, Merge merge);
  const Merge* find(TokenId left, TokenId right) const;

 private:
  struct Slot {
    std::uint64_t pair;
    Merge merge;
  };
  std::size_t slot_of(std::uint64_t pair) const;
  std::vector<Slot> slots_;
  int shift_;
};

struct Bpe {
  std::array<std::optional<TokenId>, 256> byte_ids;
  MergeTable merges{0};
  std::optional<TokenId> unknown;  // stands for bytes without a token
  bool fuse_unknown = false;       // one `unknown` for a run of them
  bool ignore_merges = false;      // a word that is itself a token is that token
};

class WordEncoder {
 public:
  // REQUIRES: both outlive this. text_bytes sizes the cache.
  WordEncoder(const Bpe& bpe, const Vocabulary& vocabulary, std::size_t text_bytes);

  // Appends the ids of a word to out.
  // REQUIRES: out is the same vector in each call, only appended to in between, and the bytes of
  // earlier words are still there: the cache refers to both.
  void encode(std::string_view word, std::vector<TokenId>& out);

 private:
  struct CachedWord {
    std::string_view word;
    std::size_t first_id = 0;  // where its ids stand in out
    std::size_t num_ids = 0;
  };
  struct Symbol {
    TokenId id;
    std::int32_t previous;  // index, or -1
    std::int32_t next;      // index, or -1
    bool merged_away;
  };
  struct Candidate {
    std::uint32_t rank;
    std::int32_t left;  // index of the left symbol
    TokenId result;
  };

  void encode_uncached(std::string_view word, std::vector<TokenId>& out);
  void start_symbols(std::string_view word);
  void merge_symbols();
  void push_candidate(std::int32_t left);

  const Bpe& bpe_;
  const Vocabulary& vocabulary_;
  std::vector<CachedWord> cache_;  // by the word's hash; a new word takes the place of an old one
  std::vector<Symbol> symbols_;    // of the word at hand, linked from the first on
  std::vector<Candidate> heap_;
};

}  // namespace foretoken::internal
