// Normalizer: what is done to a text before it is split into words.
#pragma once

#include <deque>
#include <string>
#include <string_view>

namespace foretoken::internal {

class Normalizer {
 public:
  enum class Kind { kNone, kNfc };
  explicit Normalizer(Kind kind = Kind::kNone) : kind_(kind) {}
  Kind kind() const { return kind_; }

  // NFC in Unicode 9, which the crate unicode-normalization-alignments 0.1 of `tokenizers` holds:
  // to it a newer character neither composes nor is reordered.
  // The result is text itself, or new text that is put into storage. REQUIRES: text is UTF-8.
  std::string_view normalize(std::string_view text, std::deque<std::string>& storage) const;

 private:
  Kind kind_;
};

}  // namespace foretoken::internal
