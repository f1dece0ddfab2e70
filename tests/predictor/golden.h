// tests/predictor/data/golden.safetensors, as tests/oracles/convert_golden.py describes it.
#pragma once

#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "common/safetensors.h"
#include "predictor/weights.h"

namespace foretoken::predictor {

struct Golden {
  int maps;
  int steps;
  int prefill_columns;  // of history0
  int columns;          // of rows and scores
  int k;
  std::vector<float> history0;
  std::vector<float> scores;
  std::vector<std::int32_t> top;
  std::vector<float> rows;
  std::vector<std::int32_t> length;

  std::span<const float> prefill_row(int map, int r) const {
    return std::span(history0).subspan(
        static_cast<std::size_t>((map * kernels::kHistoryRows + r) * prefill_columns),
        static_cast<std::size_t>(prefill_columns));
  }
  // [maps, columns] of a step.
  std::span<const float> step_rows(int step) const {
    const auto size = static_cast<std::size_t>(maps * columns);
    return std::span(rows).subspan(static_cast<std::size_t>(step) * size, size);
  }
  float score(int step, int map, int column) const {
    return scores[static_cast<std::size_t>((step * maps + map) * columns + column)];
  }
  std::span<const std::int32_t> best(int step, int map) const {
    return std::span(top).subspan(static_cast<std::size_t>((step * maps + map) * k),
                                  static_cast<std::size_t>(k));
  }
};

template <typename T>
std::vector<T> golden_array(const SafetensorsFile& file, std::string_view name) {
  const TensorView tensor = file.tensor(name).value();
  std::vector<T> out(tensor.bytes.size() / sizeof(T));
  std::memcpy(out.data(), tensor.bytes.data(), tensor.bytes.size());
  return out;
}

inline Golden read_golden() {
  const auto file = SafetensorsFile::open(FORETOKEN_GOLDEN).value_or_throw();
  const auto shape = [&](std::string_view name) { return file.tensor(name).value().shape; };
  Golden g;
  g.maps = static_cast<int>(shape("history0")[0]);
  g.prefill_columns = static_cast<int>(shape("history0")[2]);
  g.steps = static_cast<int>(shape("rows")[0]);
  g.columns = static_cast<int>(shape("rows")[2]);
  g.k = static_cast<int>(shape("top")[2]);
  g.history0 = golden_array<float>(file, "history0");
  g.scores = golden_array<float>(file, "scores");
  g.top = golden_array<std::int32_t>(file, "top");
  g.rows = golden_array<float>(file, "rows");
  g.length = golden_array<std::int32_t>(file, "length");
  return g;
}

}  // namespace foretoken::predictor
