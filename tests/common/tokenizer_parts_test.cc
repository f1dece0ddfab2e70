// The tokenizer's parts, each against a plain version of itself.
#include <gmock/gmock.h>

#include <deque>
#include <random>
#include <string>
#include <vector>

#include "common/internal/tokenizer_added.h"
#include "common/internal/tokenizer_bpe.h"
#include "common/internal/tokenizer_normalizer.h"
#include "common/internal/tokenizer_regex.h"
#include "common/internal/tokenizer_words.h"
#include "common/internal/utf8.h"
#include "common/result.h"

namespace foretoken::internal {
namespace {

using Words = std::vector<std::string_view>;

// A vocabulary of random merges over the letters a to e; 'f' has no token.
struct RandomBpe {
  Vocabulary vocabulary{2000};
  Bpe bpe;

  explicit RandomBpe(std::uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<std::string> texts;
    const auto add = [&](const std::string& text) {
      if (vocabulary.find_text(text)) return;
      EXPECT_TRUE(vocabulary.add(static_cast<TokenId>(texts.size()), text));
      texts.push_back(text);
    };
    for (const char* letter : {"a", "b", "c", "d", "e"}) add(letter);
    bpe.merges = MergeTable(300);
    for (std::uint32_t rank = 0; rank < 300; ++rank) {
      const std::string left = texts[random() % texts.size()];
      const std::string right = texts[random() % texts.size()];
      if (left.size() + right.size() > 12) continue;
      add(left + right);
      bpe.merges.set(*vocabulary.find_text(left), *vocabulary.find_text(right),
                     {rank, *vocabulary.find_text(left + right)});
    }
    for (const char letter : {'a', 'b', 'c', 'd', 'e'}) {
      bpe.byte_ids[static_cast<unsigned char>(letter)] = vocabulary.find_word({&letter, 1});
    }
  }
};

// The definition: merge the pair of the lowest rank, the leftmost of them, until there is none.
std::vector<TokenId> merge_plainly(const Bpe& bpe, std::string_view word) {
  std::vector<TokenId> ids;
  for (const char byte : word) {
    if (const auto id = bpe.byte_ids[static_cast<unsigned char>(byte)]) ids.push_back(*id);
  }
  while (true) {
    const Merge* best = nullptr;
    std::size_t best_left = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const Merge* merge = bpe.merges.find(ids[i], ids[i + 1]);
      if (merge != nullptr && (best == nullptr || merge->rank < best->rank)) {
        best = merge;
        best_left = i;
      }
    }
    if (best == nullptr) return ids;
    ids[best_left] = best->result;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best_left) + 1);
  }
}

TEST(Bpe, MergesByTheDefinition) {
  for (std::uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const RandomBpe model(seed);
    WordEncoder encoder(model.bpe, model.vocabulary, 1000);
    std::mt19937 random(seed);
    std::vector<TokenId> ids;
    std::deque<std::string> words;  // the encoder's cache views them
    for (int round = 0; round < 200; ++round) {
      std::string& word = words.emplace_back();
      const std::size_t length = round < 10 ? round : random() % 100;
      while (word.size() < length) word.push_back(static_cast<char>('a' + random() % 6));
      const auto expected = merge_plainly(model.bpe, word);
      const std::size_t first_id = ids.size();
      encoder.encode(word, ids);
      EXPECT_EQ(
          std::vector<TokenId>(ids.begin() + static_cast<std::ptrdiff_t>(first_id), ids.end()),
          expected)
          << word;
    }
  }
}

TEST(Bpe, TheCacheGivesWhatMergingGives) {
  const RandomBpe model(7);
  std::mt19937 random(7);
  std::vector<std::string> words(3000);
  for (std::string& word : words) {
    for (std::size_t i = 0; i <= random() % 5; ++i) {
      word.push_back(static_cast<char>('a' + random() % 6));
    }
  }
  for (const std::size_t text_bytes : {0, 100, 10'000}) {  // caches with and without collisions
    WordEncoder encoder(model.bpe, model.vocabulary, text_bytes);
    std::vector<TokenId> ids;
    std::vector<TokenId> expected;
    for (const std::string& word : words) {
      encoder.encode(word, ids);
      const auto part = merge_plainly(model.bpe, word);
      expected.insert(expected.end(), part.begin(), part.end());
    }
    EXPECT_EQ(ids, expected);
  }
}

TEST(Utf8, ReplacesMaximalIllFormedParts) {
  const std::string r = "\xEF\xBF\xBD";
  const std::pair<std::string, std::string> cases[] = {
      {"", ""},
      {"plain ascii text", "plain ascii text"},
      {"\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80", "\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80"},
      // Unicode 15, table 3-8: non-shortest forms, ill-formed surrogates, others, truncated.
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", r + r + r + r + "A"},
      {"a\xF0\x9F\x98", "a" + r},
  };
  for (const auto& [bytes, expected] : cases) {
    std::string text;
    append_lossy_utf8(bytes, text);
    EXPECT_EQ(text, expected);
    EXPECT_EQ(find_ill_formed_utf8(bytes) == bytes.size(), bytes == expected);
  }
}

TEST(Utf8, LeavesACutOffPart) {
  std::string text;
  EXPECT_EQ(append_complete_utf8("ab\xF0\x9F\x98", text), 2U);
  EXPECT_EQ(text, "ab");
  EXPECT_EQ(append_complete_utf8("\xF0\x9F\x28", text), 3U);
  EXPECT_EQ(text, "ab\xEF\xBF\xBD(");
}

Words cut(const std::string& pattern, std::string_view text,
          SplitBehavior behavior = SplitBehavior::kIsolated, bool invert = false) {
  std::vector<WordStage> stages;
  stages.emplace_back(SplitStage{Regex(pattern, Regex::Syntax::kPattern), behavior, invert});
  Words words;
  std::deque<std::string> storage;
  const PreTokenizer pre_tokenizer(std::move(stages));
  EXPECT_TRUE(pre_tokenizer.split(text, words, storage));
  return words;
}

// The examples of `tokenizers`, tokenizer/normalizer.rs.
TEST(PreTokenizer, SplitsAsEachBehaviorSays) {
  const std::string_view text = "The-final--countdown";
  EXPECT_EQ(cut("-", text, SplitBehavior::kRemoved), (Words{"The", "final", "countdown"}));
  EXPECT_EQ(cut("-", text, SplitBehavior::kIsolated),
            (Words{"The", "-", "final", "-", "-", "countdown"}));
  EXPECT_EQ(cut("-", text, SplitBehavior::kMergedWithPrevious),
            (Words{"The-", "final-", "-", "countdown"}));
  EXPECT_EQ(cut("-", text, SplitBehavior::kMergedWithNext),
            (Words{"The", "-final", "-", "-countdown"}));
  EXPECT_EQ(cut("-", text, SplitBehavior::kContiguous),
            (Words{"The", "-", "final", "--", "countdown"}));
  EXPECT_EQ(cut("-", text, SplitBehavior::kRemoved, true), (Words{"-", "-", "-"}));
}

TEST(PreTokenizer, SeesTheOraclesUnicode) {
  EXPECT_EQ(cut(R"(\s+)", "a\u180Eb\u0085c\u200Bd", SplitBehavior::kRemoved),
            (Words{"a\u180Eb", "c\u200Bd"}));
  // U+1C89 (Lu) and U+10D40 (Nd) are new in Unicode 16.
  EXPECT_EQ(cut(R"(\p{L}+)", "-\u1C89a-"), (Words{"-", "\u1C89a", "-"}));
  EXPECT_EQ(cut(R"(\p{N})", "\U00010D40\U00010D41"), (Words{"\U00010D40", "\U00010D41"}));
}

TEST(Regex, RefusesWhatTheEnginesReadDifferently) {
  for (const char* pattern :
       {"\\w", "\\bx", "[\\W]", "\\h", "\\p{Han}", "\\p{^L}", "\\pL", "[[:alpha:]]", "[a[b]]",
        "[a&&b]", "a{1,3}+", "(?m:a)", "(?<n>a)", "(*UTF)", "\\1(a)", "[]a]", "\\K", "(a", "\\"}) {
    EXPECT_THROW(Regex(pattern, Regex::Syntax::kPattern), Exception) << pattern;
  }
  EXPECT_NO_THROW(Regex(R"((?i:'s)|[^\r\n\p{L}\p{N}]?+\p{Lu}++(?!\S)(?<=a)\x{1F600}\[)",
                        Regex::Syntax::kPattern));
  EXPECT_NO_THROW(Regex("(a[", Regex::Syntax::kLiteral));
}

TEST(AddedTokens, FindsTheLeftmostLongest) {
  AddedTokens tokens;
  ASSERT_TRUE(tokens.add("ab", {.id = 1}));
  ASSERT_TRUE(tokens.add("abcd", {.id = 2}));
  ASSERT_TRUE(tokens.add("bcde", {.id = 3}));
  ASSERT_TRUE(tokens.add("x", {.id = 4, .special = true}));
  EXPECT_FALSE(tokens.add("ab", {.id = 5}));
  const auto found = [&](std::string_view text, bool special = true) {
    std::vector<AddedSplit> splits;
    tokens.find(text, special, splits);
    std::string shown;
    for (const auto& split : splits) {
      shown += "[" + std::string(text.substr(split.begin, split.end - split.begin)) +
               (split.id ? "=" + std::to_string(*split.id) : "") + "]";
    }
    return shown;
  };
  EXPECT_EQ(found("abcde"), "[abcd=2][e]");
  EXPECT_EQ(found("abcxab"), "[ab=1][c][x=4][ab=1]");
  EXPECT_EQ(found("abcxab", false), "[ab=1][cx][ab=1]");
  EXPECT_EQ(found(""), "");
}

TEST(Normalizer, ComposesAsUnicode9) {
  const Normalizer nfc(Normalizer::Kind::kNfc);
  std::deque<std::string> storage;
  EXPECT_EQ(nfc.normalize("e\u0301 \u212B", storage), "\u00E9 \u00C5");
  EXPECT_EQ(nfc.normalize("o\u0302\u0323", storage), "\u1ED9");
  // U+0898 (Unicode 14) has combining class 230 now; to an older version it starts anew.
  EXPECT_EQ(nfc.normalize("a\u0898\u0323", storage), "a\u0898\u0323");
  const std::string plain = "caf\u00E9";
  EXPECT_EQ(nfc.normalize(plain, storage).data(), plain.data());
}

}  // namespace
}  // namespace foretoken::internal
