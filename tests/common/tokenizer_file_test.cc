// tokenizer.json files that must not load: each error names the file and the field.
#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "common/tokenizer.h"

namespace foretoken {
namespace {

using nlohmann::json;

// The smallest file that loads: two letters, one merge, one special token.
json small_file() {
  return json::parse(R"({
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false, "special": true}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
    "post_processor": null,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
  })");
}

json split_by(const std::string& pattern) {
  return {{"type", "Sequence"},
          {"pretokenizers",
           {{{"type", "Split"},
             {"pattern", {{"Regex", pattern}}},
             {"behavior", "Isolated"},
             {"invert", false}},
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
}

TEST(TokenizerFile, LoadsTheSmallestFile) {
  const auto tokenizer = Tokenizer::parse(small_file().dump(), R"({"eos_token": "<s>"})");
  ASSERT_TRUE(tokenizer) << tokenizer.error().message;
  EXPECT_EQ(tokenizer->encode("ab<s>ba").value_or_throw(), (std::vector<TokenId>{2, 3, 1, 0}));
  EXPECT_EQ(tokenizer->eos(), 3);
}

TEST(TokenizerFile, TakesASparseVocabulary) {
  json file = small_file();
  file["model"]["vocab"]["ab"] = 1000;
  const auto tokenizer = Tokenizer::parse(file.dump());
  ASSERT_TRUE(tokenizer);
  EXPECT_EQ(tokenizer->vocab_size(), 1001U);
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{1000, 500, 0}), "aba");
}

struct BadFile {
  std::string name;
  std::function<void(json&)> break_it;
  std::string field;
};

class TokenizerBadFile : public testing::TestWithParam<BadFile> {};

TEST_P(TokenizerBadFile, IsRefusedByFileAndField) {
  json file = small_file();
  GetParam().break_it(file);
  const auto tokenizer = Tokenizer::parse(file.dump());
  ASSERT_FALSE(tokenizer);
  EXPECT_EQ(tokenizer.error().code, ErrorCode::kModelFile);
  EXPECT_THAT(tokenizer.error().message,
              testing::StartsWith("tokenizer.json: field " + GetParam().field + ":"));
}

const BadFile kBadFiles[] = {
    {"NoModel", [](json& f) { f.erase("model"); }, "model"},
    {"ModelIsAList", [](json& f) { f["model"] = json::array(); }, "model"},
    {"Unigram", [](json& f) { f["model"]["type"] = "Unigram"; }, "model.type"},
    {"NoVocab", [](json& f) { f["model"].erase("vocab"); }, "model.vocab"},
    {"NegativeId", [](json& f) { f["model"]["vocab"]["a"] = -1; }, "model.vocab.a"},
    {"FractionalId", [](json& f) { f["model"]["vocab"]["a"] = 0.5; }, "model.vocab.a"},
    {"HugeId", [](json& f) { f["model"]["vocab"]["a"] = 1U << 31; }, "model.vocab.a"},
    {"IdTwice", [](json& f) { f["model"]["vocab"]["b"] = 0; }, "model.vocab.b"},
    {"NoMerges", [](json& f) { f["model"].erase("merges"); }, "model.merges"},
    {"MergeOfOne", [](json& f) { f["model"]["merges"][0] = {"a"}; }, "model.merges[0]"},
    {"MergeOfThree", [](json& f) { f["model"]["merges"][0] = "a b c"; }, "model.merges[0]"},
    {"MergeOfNumbers",
     [](json& f) {
       f["model"]["merges"][0] = {1, 2};
     },
     "model.merges[0]"},
    {"MergeOfStranger", [](json& f) { f["model"]["merges"][0] = "a c"; }, "model.merges[0]"},
    {"MergeToStranger", [](json& f) { f["model"]["merges"][0] = "b a"; }, "model.merges[0]"},
    {"Dropout", [](json& f) { f["model"]["dropout"] = 0.1; }, "model.dropout"},
    {"ByteFallback", [](json& f) { f["model"]["byte_fallback"] = true; }, "model.byte_fallback"},
    {"Suffix", [](json& f) { f["model"]["end_of_word_suffix"] = "x"; }, "model.end_of_word_suffix"},
    {"StrangeUnknown", [](json& f) { f["model"]["unk_token"] = "x"; }, "model.unk_token"},
    {"Lowercase", [](json& f) { f["normalizer"]["type"] = "Lowercase"; }, "normalizer.type"},
    {"NormalizerWithoutType", [](json& f) { f["normalizer"] = json::object(); }, "normalizer.type"},
    {"NoPreTokenizer", [](json& f) { f["pre_tokenizer"] = nullptr; }, "pre_tokenizer"},
    {"Metaspace", [](json& f) { f["pre_tokenizer"]["type"] = "Metaspace"; }, "pre_tokenizer.type"},
    {"NotByteLevelLast",
     [](json& f) {
       f["pre_tokenizer"] = {{"type", "Digits"}, {"individual_digits", true}};
     },
     "pre_tokenizer"},
    {"ByteLevelTwice",
     [](json& f) {
       f["pre_tokenizer"] = {{"type", "Sequence"},
                             {"pretokenizers", {f["pre_tokenizer"], f["pre_tokenizer"]}}};
     },
     "pre_tokenizer.pretokenizers[1]"},
    {"PatternWontCompile", [](json& f) { f["pre_tokenizer"] = split_by("(a"); },
     "pre_tokenizer.pretokenizers[0].pattern.Regex"},
    {"PatternIsForeign", [](json& f) { f["pre_tokenizer"] = split_by("[a&&b]"); },
     "pre_tokenizer.pretokenizers[0].pattern.Regex"},
    {"UnknownBehavior",
     [](json& f) {
       f["pre_tokenizer"] = split_by("a");
       f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Eaten";
     },
     "pre_tokenizer.pretokenizers[0].behavior"},
    {"NoDecoder", [](json& f) { f["decoder"] = nullptr; }, "decoder"},
    {"MetaspaceDecoder", [](json& f) { f["decoder"]["type"] = "Metaspace"; }, "decoder"},
    {"BertProcessing", [](json& f) { f["post_processor"]["type"] = "BertProcessing"; },
     "post_processor.type"},
    {"TemplateWithoutText",
     [](json& f) {
       f["post_processor"] = {{"type", "TemplateProcessing"}, {"single", json::array()}};
     },
     "post_processor.single"},
    {"TemplateIdOutOfRange",
     [](json& f) {
       f["post_processor"] = {{"type", "TemplateProcessing"},
                              {"single", {{{"SpecialToken", {{"id", "x"}}}}}},
                              {"special_tokens", {{"x", {{"ids", {4}}}}}}};
     },
     "post_processor.special_tokens.x.ids[0]"},
    {"AddedTokensIsAString", [](json& f) { f["added_tokens"] = "x"; }, "added_tokens"},
    {"AddedIdTaken", [](json& f) { f["added_tokens"][0]["id"] = 1; }, "added_tokens[0].id"},
    {"AddedIdTooLarge", [](json& f) { f["added_tokens"][0]["id"] = 1 << 20; },
     "added_tokens[0].id"},
    {"AddedDisagreesWithVocab", [](json& f) { f["added_tokens"][0]["content"] = "ab"; },
     "added_tokens[0].id"},
    {"AddedIsEmpty", [](json& f) { f["added_tokens"][0]["content"] = ""; },
     "added_tokens[0].content"},
    {"AddedIsHuge", [](json& f) { f["added_tokens"][0]["content"] = std::string(1025, 'x'); },
     "added_tokens[0].content"},
    {"AddedTwice", [](json& f) { f["added_tokens"].push_back(f["added_tokens"][0]); },
     "added_tokens[1].content"},
    {"AddedWithoutContent", [](json& f) { f["added_tokens"][0].erase("content"); },
     "added_tokens[0].content"},
};

INSTANTIATE_TEST_SUITE_P(All, TokenizerBadFile, testing::ValuesIn(kBadFiles),
                         [](const auto& test) { return test.param.name; });

TEST(TokenizerFile, RefusesWhatIsNotJson) {
  for (const std::string bad : {"", "[]", "{\"a\":", "{\"a\": \"\xFF\"}", "{\"a\": \"\\ud800\"}"}) {
    const auto tokenizer = Tokenizer::parse(bad);
    ASSERT_FALSE(tokenizer) << bad;
    EXPECT_THAT(tokenizer.error().message, testing::StartsWith("tokenizer.json: "));
  }
}

TEST(TokenizerFile, RefusesDeepNesting) {
  std::string deep = "null";
  for (int i = 0; i < 100'000; ++i) deep = "[" + deep;
  EXPECT_FALSE(Tokenizer::parse("{\"a\": " + deep));
  json file = small_file();
  json normalizer = {{"type", "NFC"}};
  for (int i = 0; i < 100; ++i) {
    normalizer = {{"type", "Sequence"}, {"normalizers", {normalizer}}};
  }
  file["normalizer"] = normalizer;
  EXPECT_FALSE(Tokenizer::parse(file.dump()));
}

TEST(TokenizerFile, RefusesAnEosThatIsNoToken) {
  const auto tokenizer = Tokenizer::parse(small_file().dump(), R"({"eos_token": "</s>"})");
  ASSERT_FALSE(tokenizer);
  EXPECT_THAT(tokenizer.error().message,
              testing::StartsWith("tokenizer_config.json: field eos_token:"));
}

TEST(TokenizerFile, NamesTheFolderOfAMissingFile) {
  const auto folder = std::filesystem::path(testing::TempDir()) / "foretoken_no_tokenizer";
  std::filesystem::create_directories(folder);
  const auto tokenizer = Tokenizer::load(folder);
  ASSERT_FALSE(tokenizer);
  EXPECT_EQ(tokenizer.error().code, ErrorCode::kModelFile);
  EXPECT_THAT(tokenizer.error().message, testing::HasSubstr(folder.string()));
  EXPECT_THAT(tokenizer.error().message, testing::HasSubstr("tokenizer.json"));
}

// A pattern that backtracks without end stops at the match limit.
TEST(TokenizerFile, BoundsTheWorkOfAPattern) {
  json file = small_file();
  file["pre_tokenizer"] = split_by("(a+)+[bc]");
  const auto tokenizer = Tokenizer::parse(file.dump());
  ASSERT_TRUE(tokenizer);
  const auto ids = tokenizer->encode(std::string(1000, 'a'));
  ASSERT_FALSE(ids);
  EXPECT_EQ(ids.error().code, ErrorCode::kModelFile);
}

}  // namespace
}  // namespace foretoken
