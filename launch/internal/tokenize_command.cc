// foretoken tokenize, detokenize: text to the ids a model sees, and back.
#include <iostream>
#include <nlohmann/json.hpp>

#include "common/tokenizer.h"
#include "launch/internal/cli.h"
#include "launch/internal/files.h"

namespace foretoken::launch {
namespace {

struct TokenizeOptions {
  std::string model;
  std::string text;
  std::string file;
  bool plain = false;
};

Tokenizer load_tokenizer(const std::string& model) {
  return Tokenizer::load(find_model(model).value_or_throw()).value_or_throw();
}

int tokenize(const TokenizeOptions& options) {
  const Tokenizer tokenizer = load_tokenizer(options.model);
  const std::string text =
      options.file.empty() ? options.text : read_text(options.file).value_or_throw();
  const auto ids = tokenizer.encode(text, {.add_special = !options.plain}).value_or_throw();
  std::cout << nlohmann::json(ids).dump() << "\n";
  return 0;
}

struct DetokenizeOptions {
  std::string model;
  std::string ids_file;
  bool keep_special = false;
};

int detokenize(const DetokenizeOptions& options) {
  const Tokenizer tokenizer = load_tokenizer(options.model);
  const auto ids = read_ids(options.ids_file).value_or_throw();
  std::cout << tokenizer.decode(ids,
                                options.keep_special ? SpecialTokens::kKeep : SpecialTokens::kSkip)
            << std::flush;
  return 0;
}

}  // namespace

void add_tokenize_commands(CLI::App& app, Action& action) {
  auto to_ids = std::make_shared<TokenizeOptions>();
  CLI::App* tokenize_app = app.add_subcommand("tokenize", "Print a text's token ids as JSON");
  tokenize_app->add_option("MODEL", to_ids->model, "Model folder or name")->required();
  CLI::Option* text = tokenize_app->add_option("--text", to_ids->text, "The text");
  CLI::Option* file =
      tokenize_app->add_option("--file", to_ids->file, "A file of text ('-': standard input)");
  text->excludes(file);
  tokenize_app->add_flag("--no-special", to_ids->plain,
                         "Without the tokens that the tokenizer puts around a text");
  tokenize_app->callback([text, file, to_ids, &action] {
    if (text->empty() && file->empty()) throw CLI::RequiredError("--text or --file");
    action = [to_ids] { return tokenize(*to_ids); };
  });

  auto to_text = std::make_shared<DetokenizeOptions>();
  CLI::App* detokenize_app = app.add_subcommand("detokenize", "Print the text of token ids");
  detokenize_app->add_option("MODEL", to_text->model, "Model folder or name")->required();
  detokenize_app->add_option("--ids", to_text->ids_file, "JSON list ('-': standard input)")
      ->required();
  detokenize_app->add_flag("--keep-special", to_text->keep_special, "Print special tokens too");
  detokenize_app->callback(
      [to_text, &action] { action = [to_text] { return detokenize(*to_text); }; });
}

}  // namespace foretoken::launch
