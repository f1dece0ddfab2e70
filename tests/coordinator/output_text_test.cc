#include "coordinator/output_text.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <random>

#include "tests/coordinator/tiny_model.h"

namespace foretoken::coordinator {
namespace {

class OutputTextTest : public ::testing::Test {
 protected:
  static const std::optional<Tokenizer>& tokenizer() {
    static const std::optional<Tokenizer> loaded = [] {
      const auto folder = std::filesystem::temp_directory_path() /
                          ("foretoken_output_text_" + std::to_string(::getpid()));
      write_tiny_model(folder);
      auto result = Tokenizer::load(folder).value_or_throw();
      std::filesystem::remove_all(folder);
      return result;
    }();
    return loaded;
  }

  // Pushes a text byte by byte (a token is a byte); what take() gave after each.
  static std::vector<std::string> push_all(OutputText& output, const std::string& text) {
    std::vector<std::string> taken;
    for (const char c : text) {
      if (output.push(static_cast<unsigned char>(c))) break;
      taken.push_back(output.take());
    }
    return taken;
  }
};

TEST_F(OutputTextTest, GivesTextAsItComes) {
  OutputText output(tokenizer(), {});
  EXPECT_EQ(push_all(output, "abc"), (std::vector<std::string>{"a", "b", "c"}));
  output.finish();
  EXPECT_EQ(output.take(), "");
  EXPECT_EQ(output.text(), "abc");
}

TEST_F(OutputTextTest, CutsAtUtf8Borders) {
  OutputText output(tokenizer(), {});
  EXPECT_EQ(push_all(output, "\xe2\x82\xac!"), (std::vector<std::string>{"", "", "\u20ac", "!"}));
}

TEST_F(OutputTextTest, AnIncompleteCharacterAtTheEndIsReplaced) {
  OutputText output(tokenizer(), {});
  push_all(output, "a\xe2\x82");
  output.finish();
  EXPECT_EQ(output.text(), "a\ufffd");
}

TEST_F(OutputTextTest, HoldsBackWhatMayBeginAStopString) {
  OutputText output(tokenizer(), {"\n\n"});
  EXPECT_EQ(push_all(output, "a\nb"), (std::vector<std::string>{"a", "", "\nb"}));
}

TEST_F(OutputTextTest, EndsBeforeTheStopString) {
  OutputText output(tokenizer(), {"END"});
  push_all(output, "the EN END of it");
  EXPECT_EQ(output.text(), "the EN ");
  output.finish();
  EXPECT_EQ(output.text(), "the EN ");
}

TEST_F(OutputTextTest, HeldBackTextIsTextWhenNothingFollows) {
  OutputText output(tokenizer(), {"END"});
  push_all(output, "the EN");
  EXPECT_EQ(output.text(), "the ");
  output.finish();
  EXPECT_EQ(output.text(), "the EN");
}

TEST_F(OutputTextTest, FindsTheFirstOfSeveralStopStrings) {
  OutputText output(tokenizer(), {"cd", "bcd", "xyz"});
  push_all(output, "abcde");
  EXPECT_EQ(output.text(), "a");
}

TEST_F(OutputTextTest, WithoutATokenizerThereIsNoText) {
  OutputText output(std::nullopt, {"a"});
  EXPECT_FALSE(output.push('a'));
  output.finish();
  EXPECT_EQ(output.text(), "");
}

// Against the plain rule: the text up to the first place where a stop string is complete.
TEST_F(OutputTextTest, AgreesWithThePlainRuleOnRandomTexts) {
  constexpr unsigned kSeed = 3;
  std::mt19937 random(kSeed);
  SCOPED_TRACE(kSeed);
  const auto random_text = [&](std::size_t length) {
    std::string text;
    while (text.size() < length) text += static_cast<char>('a' + random() % 2);
    return text;
  };
  for (int i = 0; i < 3000; ++i) {
    std::vector<std::string> stops(random() % 3);
    for (auto& stop : stops) stop = random_text(1 + random() % 5);
    const auto text = random_text(random() % 20);

    std::string expected = text;
    for (std::size_t end = 0, stopped = 0; end <= text.size() && stopped == 0; ++end) {
      for (const auto& stop : stops) {
        if (!text.substr(0, end).ends_with(stop)) continue;
        expected = std::min(expected.size(), end - stop.size()) == expected.size()
                       ? expected
                       : text.substr(0, end - stop.size());
        stopped = 1;
      }
    }
    OutputText output(tokenizer(), stops);
    std::string taken;
    for (const auto& part : push_all(output, text)) taken += part;
    output.finish();
    ASSERT_EQ(output.text(), expected) << text;
    ASSERT_EQ(taken + output.take(), expected) << text;
  }
}

}  // namespace
}  // namespace foretoken::coordinator
