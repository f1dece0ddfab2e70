#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "worker/model.h"

namespace foretoken::worker {
namespace {

std::vector<std::uint16_t> values_of(const WeightSource& source, const std::string& name,
                                     std::int64_t rows, std::int64_t columns) {
  const TensorView view = source.tensor(name, std::array{rows, columns}).value_or_throw();
  std::vector<std::uint16_t> values(static_cast<std::size_t>(rows * columns));
  EXPECT_EQ(view.bytes.size(), values.size() * sizeof(std::uint16_t));
  std::memcpy(values.data(), view.bytes.data(), view.bytes.size());
  return values;
}

// Ranks read different tensors before this one; its values are the same on each.
TEST(DummySource, ATensorIsTheSameWhateverWasReadBefore) {
  const auto one = make_dummy_source({});
  const auto other = make_dummy_source({});
  values_of(*other, "larger", 5000, 512);
  values_of(*other, "elsewhere", 3, 64);
  EXPECT_EQ(values_of(*one, "a", 300, 512), values_of(*other, "a", 300, 512));
  EXPECT_NE(values_of(*one, "a", 300, 512), values_of(*one, "b", 300, 512));
}

// Longer than a period of the values, so that threads have filled parts of it.
TEST(DummySource, NoRowIsAnothersCopy) {
  constexpr std::int64_t kRows = 9000;
  constexpr std::int64_t kColumns = 512;
  const auto values = values_of(*make_dummy_source({}), "w", kRows, kColumns);
  std::vector<std::vector<std::uint16_t>> rows;
  for (std::int64_t row = 0; row < kRows; ++row) {
    const auto first = values.begin() + row * kColumns;
    rows.emplace_back(first, first + kColumns);
  }
  std::ranges::sort(rows);
  EXPECT_EQ(std::ranges::adjacent_find(rows), rows.end());
}

}  // namespace
}  // namespace foretoken::worker
