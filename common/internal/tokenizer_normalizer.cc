#include "common/internal/tokenizer_normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uniset.h>

#include <algorithm>

#include "common/check.h"

namespace foretoken::internal {
namespace {

const icu::Normalizer2& nfc_unicode_9() {
  struct Nfc {
    UErrorCode error = U_ZERO_ERROR;
    icu::UnicodeSet known{icu::UnicodeString("[:Age=9.0:]"), error};  // 9.0 and before
    const icu::Normalizer2* newest = icu::Normalizer2::getNFCInstance(error);
    icu::FilteredNormalizer2 filtered{*newest, known};
  };
  static const Nfc* nfc = [] {
    auto* made = new Nfc;
    made->known.freeze();
    FT_CHECK(U_SUCCESS(made->error), u_errorName(made->error));
    return made;
  }();
  return nfc->filtered;
}

icu::StringPiece piece(std::string_view text) {
  return {text.data(), static_cast<std::int32_t>(text.size())};
}

}  // namespace

std::string_view Normalizer::normalize(std::string_view text,
                                       std::deque<std::string>& storage) const {
  if (kind_ == Kind::kNone) return text;
  // U+0300 is the first character that NFC may change: lead byte 0xCC.
  const bool unchanged = std::all_of(
      text.begin(), text.end(), [](char byte) { return static_cast<unsigned char>(byte) < 0xCC; });
  UErrorCode error = U_ZERO_ERROR;
  if (unchanged || nfc_unicode_9().isNormalizedUTF8(piece(text), error)) return text;
  std::string& result = storage.emplace_back();
  icu::StringByteSink<std::string> sink(&result);
  nfc_unicode_9().normalizeUTF8(0, piece(text), sink, nullptr, error);
  FT_CHECK(U_SUCCESS(error), u_errorName(error), text.size());
  return result;
}

}  // namespace foretoken::internal
