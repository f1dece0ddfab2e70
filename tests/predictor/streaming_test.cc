// The streaming evaluation against golden data, a rebuild, and the plain reference.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <random>

#include "kernels/cpu/map_stream.h"
#include "tests/predictor/golden.h"
#include "tests/predictor/reference.h"
#include "tests/predictor/test_history.h"

namespace foretoken::predictor {
namespace {

using kernels::HistoryType;

constexpr int kSink = kSinkTokens / kBlockTokens;

const kernels::PredictorWeights& weights() {
  static const auto w = read_weights(published_weights()).value_or_throw();
  return w;
}

struct Agreement {
  double max_error = 0;
  double overlap = 0;  // share of the golden top-k that is in ours
};

void start_from_prefill(const Golden& golden, TestHistory* history) {
  for (int r = 0; r < kernels::kHistoryRows; ++r) {
    std::vector<float> rows;
    for (int m = 0; m < golden.maps; ++m) {
      const auto row = golden.prefill_row(m, r);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    history->append(rows, static_cast<std::size_t>(golden.prefill_columns), golden.prefill_columns);
  }
}

void append_step(const Golden& golden, int step, TestHistory* history) {
  history->append(golden.step_rows(step), static_cast<std::size_t>(golden.columns),
                  blocks_for(golden.length[static_cast<std::size_t>(step)]));
}

Agreement run_golden(HistoryType type) {
  const Golden golden = read_golden();
  const kernels::CnnFilters filters(weights());
  TestHistory history(golden.maps, golden.columns, type);
  start_from_prefill(golden, &history);
  kernels::MapStream stream;
  Agreement result;
  int common = 0;
  for (int step = 0; step < golden.steps; ++step) {
    for (int m = 0; m < golden.maps; ++m) {
      EXPECT_TRUE(stream.update(filters, history.state(), 0, m));
      const auto scores = stream.scores();
      for (std::size_t c = 0; c < scores.size(); ++c) {
        const float expected = golden.score(step, m, kSink + static_cast<int>(c));
        const double error = std::abs(static_cast<double>(scores[c] - expected));
        EXPECT_FALSE(std::isnan(error)) << "step " << step << " map " << m << " column " << c;
        result.max_error = std::max(result.max_error, error);
      }
      const auto best = golden.best(step, m);
      for (const int c : reference::top(scores, golden.k)) {
        common += static_cast<int>(std::count(best.begin(), best.end(), kSink + c));
      }
    }
    append_step(golden, step, &history);
  }
  result.overlap = static_cast<double>(common) / (golden.steps * golden.maps * golden.k);
  std::printf("max error %.2e, top-%d overlap %.4f %%\n", result.max_error, golden.k,
              100 * result.overlap);
  return result;
}

// The bounds: the design asks 2e-6 and 99.9 % of fp32; bf16 and e5m3 round the history itself.
TEST(Streaming, AgreesWithGoldenDataInFp32) {
  const Agreement a = run_golden(HistoryType::kFp32);
  EXPECT_LE(a.max_error, 2e-6);
  EXPECT_GE(a.overlap, 0.999);
}

// bf16 keeps 8 bits of a value, e5m3 four; the largest errors sit on the few hottest columns, whose
// scores stand far above the rest.
TEST(Streaming, AgreesWithGoldenDataInBf16) {
  const Agreement a = run_golden(HistoryType::kBf16);
  EXPECT_LE(a.max_error, 1e-3);
  EXPECT_GE(a.overlap, 0.999);
}

TEST(Streaming, AgreesWithGoldenDataInE5m3) {
  const Agreement a = run_golden(HistoryType::kE5m3);
  EXPECT_LE(a.max_error, 1e-2);
  EXPECT_GE(a.overlap, 0.985);
}

constexpr unsigned kSeed = 20261122;

// A row of maps x columns block maxima: heavy-tailed, and every other dozen of columns is idle, so
// that hot and affine segments both occur.
std::vector<float> random_rows(int maps, int columns, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(maps * columns));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const bool idle = i % static_cast<std::size_t>(columns) / 12 % 2 == 1;
    const float value = std::min(1.0F, std::exp(2.0F * normal(random) - 6.0F));
    rows[i] = idle ? 1e-4F * value : value;
  }
  return rows;
}

// The window's candidate columns, as the reference wants them.
reference::Image window_of(const TestHistory& history, int map) {
  const kernels::HistoryState& state = history.state();
  const int columns = kernels::num_candidates(*state.num_columns);
  reference::Image window(kernels::kHistoryRows, columns);
  std::vector<float> row(static_cast<std::size_t>(columns));
  for (int r = 0; r < window.rows; ++r) {
    const std::int64_t absolute = history.num_rows() - window.rows + r;
    if (absolute < 0) continue;
    kernels::decode_history(static_cast<HistoryType>(state.type),
                            kernels::history_row(state, 0, map, absolute), kSink, columns,
                            row.data());
    for (int c = 0; c < columns; ++c) window.at(r, c) = row[static_cast<std::size_t>(c)];
  }
  return window;
}

double max_difference(std::span<const float> ours, const std::vector<double>& expected) {
  EXPECT_EQ(ours.size(), expected.size());
  double most = 0;
  for (std::size_t c = 0; c < ours.size(); ++c) {
    const double difference = std::abs(static_cast<double>(ours[c]) - expected[c]);
    EXPECT_FALSE(std::isnan(difference)) << "column " << c;
    most = std::max(most, difference);
  }
  return most;
}

class StreamingTypes : public testing::TestWithParam<HistoryType> {};

TEST_P(StreamingTypes, SumsStayBitEqualToARebuildWhileColumnsEnter) {
  const kernels::CnnFilters filters(weights());
  std::mt19937 random(kSeed);
  constexpr int kMaps = 2;
  constexpr int kFirstColumns = 70;
  constexpr int kSteps = 200;
  const int last_columns = kFirstColumns + (kSteps + 64) / 16;
  TestHistory history(kMaps, last_columns, GetParam());
  kernels::MapStream stream;
  int comparisons = 0;
  for (int step = 0; step < 64 + kSteps; ++step) {
    const int columns = kFirstColumns + step / 16;
    history.append(random_rows(kMaps, last_columns, random), static_cast<std::size_t>(last_columns),
                   columns);
    if (step < 63) continue;
    for (int m = 0; m < kMaps; ++m) ASSERT_TRUE(stream.update(filters, history.state(), 0, m));
    if (step % 8 != 7 && step % 16 != 0) continue;
    std::vector<std::vector<std::int32_t>> slid;
    for (int m = 0; m < kMaps; ++m) slid.push_back(history.sums(m));
    history.forget_sums();
    for (int m = 0; m < kMaps; ++m) {
      ASSERT_TRUE(stream.update(filters, history.state(), 0, m));
      ASSERT_EQ(history.sums(m), slid[static_cast<std::size_t>(m)]) << "step " << step;
    }
    ++comparisons;
  }
  EXPECT_GT(comparisons, 25);
}

INSTANTIATE_TEST_SUITE_P(Types, StreamingTypes,
                         testing::Values(HistoryType::kFp32, HistoryType::kBf16,
                                         HistoryType::kE5m3));

// The golden data never has so few columns or rows.
TEST(Streaming, AgreesWithTheReferenceAtSmallSizes) {
  const kernels::CnnFilters filters(weights());
  std::mt19937 random(kSeed);
  for (const int candidates : {1, 2, 3, 4, 5, 7, 8, 9, 33}) {
    for (const int rows : {1, 2, 3, 5, 63, 64, 65, 70}) {
      const int columns = candidates + 8;
      TestHistory history(1, columns, HistoryType::kFp32);
      kernels::MapStream stream;
      for (int r = 0; r < rows; ++r) {
        history.append(random_rows(1, columns, random), static_cast<std::size_t>(columns), columns);
        // Every other run slides from the first row on; the rest rebuild at the end.
        if (rows % 2 == 1 || r + 1 == rows) stream.update(filters, history.state(), 0, 0);
      }
      const auto expected = reference::scores(weights(), window_of(history, 0));
      EXPECT_LE(max_difference(stream.scores(), expected), 1e-6)
          << candidates << " candidates, " << rows << " rows";
    }
  }
}

TEST(Streaming, SurvivesSkippedRowsRepeatedCallsAndManyNewColumns) {
  const kernels::CnnFilters filters(weights());
  std::mt19937 random(kSeed);
  constexpr int kMost = 60;
  TestHistory history(1, kMost, HistoryType::kBf16);
  kernels::MapStream stream;
  const auto append = [&](int columns) {
    history.append(random_rows(1, kMost, random), kMost, columns);
  };
  const auto check = [&](const char* what) {
    EXPECT_TRUE(stream.update(filters, history.state(), 0, 0));
    const auto expected = reference::scores(weights(), window_of(history, 0));
    EXPECT_LE(max_difference(stream.scores(), expected), 1e-6) << what;
  };
  for (int i = 0; i < 64; ++i) append(20);
  check("first");
  check("repeated");
  append(20);
  check("slid");
  append(20);
  append(20);
  check("one row skipped");
  for (int i = 0; i < 80; ++i) append(20);
  check("more than a window skipped");
  append(21);
  check("one new column");
  append(40);
  check("many new columns");
  history.append(random_rows(1, kMost, random), kMost, kMost);
  check("the greatest length");
}

// Cold and warm segments drop only relus that cannot act: the whole network gives the same scores.
TEST(Streaming, FoldedSegmentsEqualTheWholeNetwork) {
  const kernels::CnnFilters filters(weights());
  EXPECT_NEAR(filters.bottom.cold.limit, 6.19e-4, 0.02e-4);  // of the published weights
  EXPECT_NEAR(filters.bottom.warm.limit, 3.26e-3, 0.02e-3);
  kernels::CnnFilters whole(weights());
  kernels::CnnFilters warm_too(weights());
  whole.bottom.cold.limit = whole.bottom.warm.limit = 0;
  warm_too.bottom.cold.limit = 0;
  std::mt19937 random(kSeed);
  constexpr int kColumns = 300;
  TestHistory history(1, kColumns, HistoryType::kFp32);
  for (int i = 0; i < 66; ++i) history.append(random_rows(1, kColumns, random), kColumns, kColumns);
  const auto scores = [&](const kernels::CnnFilters& with) {
    kernels::MapStream stream;
    history.forget_sums();
    EXPECT_TRUE(stream.update(with, history.state(), 0, 0));
    return std::vector<float>(stream.scores().begin(), stream.scores().end());
  };
  const auto expected = scores(whole);
  const auto whole_sums = history.sums(0);
  const auto without_cold = scores(warm_too);
  EXPECT_NE(history.sums(0), whole_sums) << "no segment was warm, so nothing was compared";
  const auto warm_sums = history.sums(0);
  const auto all = scores(filters);
  EXPECT_NE(history.sums(0), warm_sums) << "no segment was cold, so nothing was compared";
  for (std::size_t c = 0; c < all.size(); ++c) {
    EXPECT_NEAR(without_cold[c], expected[c], 2e-7) << c;
    EXPECT_NEAR(all[c], expected[c], 2e-7) << c;
  }
}

// At the very limits of cold and warm, where a relu is about to act.
TEST(Streaming, LimitsAreOnTheSafeSide) {
  const kernels::CnnFilters filters(weights());
  std::mt19937 random(kSeed);
  constexpr int kColumns = 60;
  for (const float limit : {filters.bottom.cold.limit, filters.bottom.warm.limit}) {
    TestHistory history(1, kColumns, HistoryType::kFp32);
    kernels::MapStream stream;
    std::bernoulli_distribution coin(0.5);
    for (int i = 0; i < 66; ++i) {
      std::vector<float> row(kColumns);
      for (float& value : row) value = coin(random) ? std::nextafter(limit, 0.0F) : 0.0F;
      history.append(row, kColumns, kColumns);
      stream.update(filters, history.state(), 0, 0);
    }
    const auto expected = reference::scores(weights(), window_of(history, 0));
    EXPECT_LE(max_difference(stream.scores(), expected), 1e-6) << limit;
  }
}

// A value that is no probability makes scores unusable until its row has left, and no longer.
TEST(Streaming, DistrustsAWindowWithAValueThatIsNone) {
  const kernels::CnnFilters filters(weights());
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(), -1.0F, 3.0F}) {
    for (const HistoryType type : {HistoryType::kFp32, HistoryType::kBf16, HistoryType::kE5m3}) {
      const bool stored = type != HistoryType::kE5m3 || !(bad < 0);  // e5m3 has no sign
      std::mt19937 random(kSeed);
      constexpr int kColumns = 40;
      TestHistory history(1, kColumns, type);
      kernels::MapStream stream;
      const auto step = [&](std::optional<float> value) {
        auto row = random_rows(1, kColumns, random);
        if (value) row[20] = *value;
        history.append(row, kColumns, kColumns);
        return stream.update(filters, history.state(), 0, 0);
      };
      for (int i = 0; i < 64; ++i) EXPECT_TRUE(step(std::nullopt));
      EXPECT_EQ(step(bad), !stored);
      for (int i = 0; i < 63; ++i) EXPECT_EQ(step(std::nullopt), !stored) << bad << " row " << i;
      EXPECT_TRUE(step(std::nullopt)) << bad;
      const auto expected = reference::scores(weights(), window_of(history, 0));
      EXPECT_LE(max_difference(stream.scores(), expected), 1e-6) << bad;
    }
  }
}

}  // namespace
}  // namespace foretoken::predictor
