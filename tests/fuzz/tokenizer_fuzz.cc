// Fuzzes the reader of tokenizer.json and what it loads: some values of a good file are replaced,
// then the rest of the input is encoded and decoded, whole and as a stream.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tokenizer.h"

namespace {

using nlohmann::json;

// Uses every component, with the splitting of Qwen2.5; 64 letters and some merges.
json good_file() {
  json file = json::parse(R"({
    "version": "1.0",
    "added_tokens": [
      {"id": 300, "content": "<s>", "special": true, "normalized": false},
      {"id": 301, "content": "abc", "lstrip": true, "rstrip": true, "single_word": true}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex":
          "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
       "behavior": "Isolated", "invert": false},
      {"type": "Digits", "individual_digits": true},
      {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}]},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [300]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "dropout": null, "unk_token": "a", "fuse_unk": false,
              "ignore_merges": true, "vocab": {"ab": 200, "abab": 201, "Ġa": 202, "Ġ": 203},
              "merges": [["a", "b"], "ab ab", ["Ġ", "a"]]}
  })");
  for (char letter = '@'; letter < 0x7F; ++letter) {
    file["model"]["vocab"][std::string(1, letter)] = letter;
  }
  return file;
}

json some_value(FuzzedDataProvider& data) {
  switch (data.ConsumeIntegralInRange(0, 6)) {
    case 0:
      return nullptr;
    case 1:
      return data.ConsumeBool();
    case 2:
      return data.ConsumeIntegral<std::int64_t>();
    case 3:
      return data.ConsumeIntegralInRange(0, 400);
    case 4:
      return json::array();
    case 5:
      return json::object();
    default:
      return data.ConsumeRandomLengthString(40);
  }
}

// Walks down from value at random, and changes what it ends at.
void change_one(json& value, FuzzedDataProvider& data) {
  if (!value.empty() && value.is_structured() && data.ConsumeIntegralInRange(0, 9) > 0) {
    const auto index = data.ConsumeIntegralInRange<std::size_t>(0, value.size() - 1);
    return change_one(*std::next(value.begin(), static_cast<std::ptrdiff_t>(index)), data);
  }
  if (value.is_array() && !value.empty() && data.ConsumeBool()) {
    value.push_back(value.front());
  } else if (value.is_object() && data.ConsumeBool()) {
    value[data.ConsumeRandomLengthString(8)] = some_value(data);
  } else {
    value = some_value(data);
  }
}

void encode_and_decode(const foretoken::Tokenizer& tokenizer, const std::string& text,
                       bool allow_special) {
  const auto ids = tokenizer.encode(text, {.allow_special = allow_special});
  if (!ids) return;
  foretoken::StreamDecoder decoder(tokenizer);
  std::string streamed;
  for (const foretoken::TokenId id : *ids) {
    FT_CHECK(id >= 0 && static_cast<std::size_t>(id) < tokenizer.vocab_size(), id);
    streamed += decoder.push(id);
  }
  streamed += decoder.flush();
  FT_CHECK(streamed == tokenizer.decode(*ids));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  FuzzedDataProvider data(bytes, size);
  static const json good = good_file();
  std::string file;
  if (data.ConsumeBool()) {
    file = data.ConsumeRandomLengthString(4096);
  } else {
    json changed = good;
    for (int i = data.ConsumeIntegralInRange(0, 4); i > 0; --i) change_one(changed, data);
    file = changed.dump(-1, ' ', false, json::error_handler_t::ignore);
  }
  const auto tokenizer = foretoken::Tokenizer::parse(file);
  if (!tokenizer) return 0;
  const bool allow_special = data.ConsumeBool();
  encode_and_decode(*tokenizer, data.ConsumeRemainingBytesAsString(), allow_special);
  return 0;
}
