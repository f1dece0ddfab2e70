// OutputText: the text of a request's tokens as its client may see it: cut at UTF-8 borders, and
// ended before the first stop string. What may turn out to be the beginning of a stop string is
// held back until it is decided.
//
// For one thread. Example: tests/coordinator/output_text_test.cc
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/tokenizer.h"

namespace foretoken::coordinator {

class OutputText {
 public:
  // Without a tokenizer (dummy models) there is no text, and no stop string is found.
  OutputText(const std::optional<Tokenizer>& tokenizer, std::vector<std::string> stops);

  // Takes a token. True when its text completes a stop string: nothing may follow then.
  bool push(TokenId id);
  // No token follows: what was held back is part of the text.
  void finish();

  const std::string& text() const { return text_; }  // decided so far
  // What was decided since the last call.
  std::string take();
  bool has_news() const { return taken_ < text_.size(); }

 private:
  bool decide(const std::string& more);
  // Bytes at the end of `held` that may begin a stop string.
  std::size_t undecided(const std::string& held) const;

  std::optional<StreamDecoder> decoder_;
  const std::vector<std::string> stops_;
  std::string text_;
  std::string held_;
  std::size_t taken_ = 0;
  bool stopped_ = false;
};

}  // namespace foretoken::coordinator
