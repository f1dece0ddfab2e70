// tokenizer_cli FOLDER: one JSON object a line in, one out, for tests/common/tokenizer_parity_test.
//
//   {"text": "...", "add_special": true, "allow_special": true}
//     -> {"ids": [...], "kept": "...", "skipped": "...", "streamed": "..."}
//
// The three texts are the ids decoded with special tokens kept, skipped, and one id at a time.
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "common/tokenizer.h"

namespace {

using foretoken::SpecialTokens;

nlohmann::json answer(const foretoken::Tokenizer& tokenizer, const nlohmann::json& question) {
  const std::string text = question.at("text");
  const auto ids = tokenizer.encode(text, {.add_special = question.at("add_special"),
                                           .allow_special = question.at("allow_special")});
  if (!ids) return {{"error", ids.error().message}};
  foretoken::StreamDecoder stream(tokenizer, SpecialTokens::kKeep);
  std::string streamed;
  for (const foretoken::TokenId id : *ids) streamed += stream.push(id);
  streamed += stream.flush();
  return {{"ids", *ids},
          {"kept", tokenizer.decode(*ids, SpecialTokens::kKeep)},
          {"skipped", tokenizer.decode(*ids, SpecialTokens::kSkip)},
          {"streamed", streamed}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: tokenizer_cli FOLDER < questions\n";
    return 2;
  }
  const auto tokenizer = foretoken::Tokenizer::load(argv[1]);
  if (!tokenizer) {
    std::cerr << "tokenizer_cli: " << tokenizer.error().message << '\n';
    return foretoken::exit_code(tokenizer.error().code);
  }
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << answer(*tokenizer, nlohmann::json::parse(line)).dump() << '\n';
  }
  return 0;
}
