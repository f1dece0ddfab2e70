// tokenizer_bench FOLDER FILE: encodes a text file, as one text on one thread. Prints bytes, ids
// and the best CPU time of some rounds. tests/bench/tokenizer_peer.py compares that with
// `tokenizers`.
#include <algorithm>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "common/result.h"
#include "common/tokenizer.h"

namespace {

constexpr int kRounds = 10;

double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

nlohmann::json measure(const char* folder, const char* file) {
  const double start = cpu_seconds();
  const auto tokenizer = foretoken::Tokenizer::load(folder).value_or_throw();
  const double load_s = cpu_seconds() - start;
  std::ifstream stream(file, std::ios::binary);
  const std::string text(std::istreambuf_iterator<char>(stream), {});
  std::size_t num_ids = 0;
  double encode_s = 1e9;
  for (int i = 0; i < kRounds; ++i) {
    const double begin = cpu_seconds();
    num_ids = tokenizer.encode(text).value_or_throw().size();
    encode_s = std::min(encode_s, cpu_seconds() - begin);
  }
  return {{"bytes", text.size()}, {"ids", num_ids}, {"load_s", load_s}, {"encode_s", encode_s}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: tokenizer_bench FOLDER FILE\n";
    return 2;
  }
  try {
    std::cout << measure(argv[1], argv[2]) << '\n';
    return 0;
  } catch (const foretoken::Exception& exception) {
    std::cerr << "tokenizer_bench: " << exception.what() << '\n';
    return foretoken::exit_code(exception.error().code);
  }
}
