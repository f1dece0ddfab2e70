// The tokenizer against golden ids of PyPI's `tokenizers` (tests/oracles/tokenizer_oracle.py), for
// the rules of SmolLM2, Llama 3 and Qwen2.5 on small vocabularies; and its door's promises.
#include "common/tokenizer.h"

#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace foretoken {
namespace {

const std::filesystem::path kData = FORETOKEN_TOKENIZER_DATA;

const Tokenizer& tokenizer_of(const std::string& rule) {
  static std::map<std::string, Tokenizer> loaded;
  const auto found = loaded.find(rule);
  if (found != loaded.end()) return found->second;
  return loaded.emplace(rule, Tokenizer::load(kData / rule).value_or_throw()).first->second;
}

std::string stream(const Tokenizer& tokenizer, const std::vector<TokenId>& ids,
                   SpecialTokens special) {
  StreamDecoder decoder(tokenizer, special);
  std::string text;
  for (const TokenId id : ids) text += decoder.push(id);
  return text + decoder.flush();
}

class TokenizerGolden : public testing::TestWithParam<const char*> {};

TEST_P(TokenizerGolden, GivesTheOraclesIdsAndTexts) {
  const Tokenizer& tokenizer = tokenizer_of(GetParam());
  std::ifstream file(kData / "golden.json");
  const auto cases = nlohmann::json::parse(file);
  int num_cases = 0;
  for (const auto& expected : cases) {
    if (expected.at("rule") != GetParam()) continue;
    ++num_cases;
    SCOPED_TRACE(expected.dump());
    const auto ids = tokenizer.encode(expected.at("text").get<std::string>(),
                                      {.allow_special = expected.at("allow_special")});
    ASSERT_TRUE(ids);
    EXPECT_EQ(*ids, expected.at("ids").get<std::vector<TokenId>>());
    EXPECT_EQ(tokenizer.decode(*ids, SpecialTokens::kKeep), expected.at("kept"));
    EXPECT_EQ(tokenizer.decode(*ids, SpecialTokens::kSkip), expected.at("skipped"));
    EXPECT_EQ(stream(tokenizer, *ids, SpecialTokens::kKeep), expected.at("kept"));
    EXPECT_EQ(stream(tokenizer, *ids, SpecialTokens::kSkip), expected.at("skipped"));
  }
  EXPECT_GT(num_cases, 60);
}

INSTANTIATE_TEST_SUITE_P(Rules, TokenizerGolden, testing::Values("smollm2", "llama3", "qwen2.5"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::erase(name, '.');
                           return name;
                         });

TEST(Tokenizer, KnowsBosEosAndSpecialTokens) {
  const Tokenizer& llama = tokenizer_of("llama3");
  ASSERT_TRUE(llama.bos() && llama.eos());
  EXPECT_EQ(llama.find_token("<|begin_of_text|>"), llama.bos());
  EXPECT_EQ(llama.find_token("<|eot_id|>"), llama.eos());
  EXPECT_TRUE(llama.is_special(*llama.bos()));
  EXPECT_EQ(llama.find_token("<|no such token|>"), std::nullopt);

  const Tokenizer& qwen = tokenizer_of("qwen2.5");
  EXPECT_EQ(qwen.bos(), std::nullopt);
  const auto tool_call = qwen.find_token("<tool_call>");
  ASSERT_TRUE(tool_call);
  EXPECT_FALSE(qwen.is_special(*tool_call));
  EXPECT_EQ(qwen.token_bytes(*tool_call), "<tool_call>");
  EXPECT_EQ(qwen.vocab_size(), static_cast<std::size_t>(*tool_call) + 2);
}

TEST(Tokenizer, AddsBosOnlyWhenAsked) {
  const Tokenizer& llama = tokenizer_of("llama3");
  const auto with = llama.encode("hi");
  const auto without = llama.encode("hi", {.add_special = false});
  ASSERT_TRUE(with && without);
  ASSERT_EQ(with->size(), without->size() + 1);
  EXPECT_EQ(with->front(), llama.bos());
}

TEST(Tokenizer, SpecialTextStaysTextWhereItIsNotAllowed) {
  const Tokenizer& smollm = tokenizer_of("smollm2");
  const auto ids = smollm.encode("<|im_end|>", {.allow_special = false});
  ASSERT_TRUE(ids);
  EXPECT_GT(ids->size(), 1U);
  EXPECT_THAT(*ids, testing::Not(testing::Contains(*smollm.find_token("<|im_end|>"))));
  EXPECT_EQ(smollm.decode(*ids), "<|im_end|>");
}

TEST(Tokenizer, DropsBytesWithoutAToken) {
  const auto ids = tokenizer_of("smollm2").encode(
      "a\x01\x02"
      "b");
  ASSERT_TRUE(ids);
  EXPECT_EQ(tokenizer_of("smollm2").decode(*ids), "ab");
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  for (const std::string bad :
       {"abc\xFF", "\xC3", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xC0\x80"}) {
    const auto ids = tokenizer_of("qwen2.5").encode(bad);
    ASSERT_FALSE(ids);
    EXPECT_EQ(ids.error().code, ErrorCode::kInvalidArgument);
  }
  EXPECT_THAT(tokenizer_of("qwen2.5").encode("abc\xFF").error().message,
              testing::HasSubstr("byte 3"));
}

TEST(Tokenizer, IgnoresIdsOutsideTheVocabulary) {
  const Tokenizer& qwen = tokenizer_of("qwen2.5");
  const auto ids = qwen.encode("ab").value_or_throw();
  std::vector<TokenId> with_strangers = {-1, 1 << 30};
  with_strangers.insert(with_strangers.begin() + 1, ids.begin(), ids.end());
  EXPECT_EQ(qwen.decode(with_strangers), "ab");
  EXPECT_EQ(qwen.token_bytes(-1), "");
  EXPECT_FALSE(qwen.is_special(1 << 30));
}

TEST(Tokenizer, TakesLongWordsWithoutQuadraticTime) {
  for (const char* rule : {"smollm2", "llama3", "qwen2.5"}) {
    for (const char byte : {'a', ' ', '\n', '-', '7'}) {
      const std::string text(1 << 18, byte);
      const auto ids = tokenizer_of(rule).encode(text, {.add_special = false});
      ASSERT_TRUE(ids);
      EXPECT_EQ(tokenizer_of(rule).decode(*ids), text);
    }
  }
}

TEST(StreamDecoder, HoldsBackIncompleteCharacters) {
  const Tokenizer& llama = tokenizer_of("llama3");
  const std::vector<TokenId> bytes = [&] {
    std::vector<TokenId> ids;
    for (const char* text : {"ð", "Ł", "ĺ", "Ģ"}) ids.push_back(*llama.find_token(text));
    return ids;  // F0 9F 98 80: U+1F600
  }();
  StreamDecoder decoder(llama);
  EXPECT_EQ(decoder.push(bytes[0]), "");
  EXPECT_EQ(decoder.push(bytes[1]), "");
  EXPECT_EQ(decoder.push(bytes[2]), "");
  EXPECT_EQ(decoder.push(bytes[3]), "\xF0\x9F\x98\x80");
  EXPECT_EQ(decoder.push(bytes[0]), "");
  EXPECT_EQ(decoder.push(*llama.find_token("a")),
            "\xEF\xBF\xBD"
            "a");
  EXPECT_EQ(decoder.push(bytes[0]), "");
  EXPECT_EQ(decoder.flush(), "\xEF\xBF\xBD");
  EXPECT_EQ(decoder.flush(), "");
}

// Random ids make every kind of ill-formed text.
TEST(StreamDecoder, AddsUpToDecode) {
  for (const char* rule : {"smollm2", "llama3", "qwen2.5"}) {
    const Tokenizer& tokenizer = tokenizer_of(rule);
    std::uint32_t state = 20261122;
    for (int round = 0; round < 200; ++round) {
      std::vector<TokenId> ids;
      for (int i = 0; i < 40; ++i) {
        state = state * 1664525 + 1013904223;
        // Mostly the 256 tokens of one byte, which stand first.
        const auto limit =
            state >> 28 < 12 ? 256U : static_cast<std::uint32_t>(tokenizer.vocab_size());
        ids.push_back(static_cast<TokenId>((state >> 8) % limit));
      }
      EXPECT_EQ(stream(tokenizer, ids, SpecialTokens::kKeep),
                tokenizer.decode(ids, SpecialTokens::kKeep))
          << rule << " round " << round;
    }
  }
}

}  // namespace
}  // namespace foretoken
