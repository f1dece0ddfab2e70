// The predictor of the CUDA device: against golden data, against the CPU device, and its sums
// against sums made anew.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "common/result.h"
#include "kernels/cpu/cnn.h"
#include "kernels/cpu/map_stream.h"
#include "kernels/cuda/cnn_tables.h"
#include "kernels/cuda/map_layout.h"
#include "predictor/weights.h"
#include "tests/kernels/cuda/history_on_device.h"
#include "tests/predictor/golden.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261123;
// Operands of the tensor cores are fp16 with 11 significant bits; scores spread by 6e-3.
constexpr double kScoreTolerance = 2e-4;
constexpr double kRelativeTolerance = 0x1p-11;  // random rows are far hotter than attention
constexpr int kSink = kSinkTokens / kBlockTokens;

const PredictorWeights& weights() {
  static const auto w = predictor::read_weights(predictor::published_weights()).value_or_throw();
  return w;
}

// The histories of some sequences on one device, and what predict() chooses from them.
class Batch {
 public:
  Batch(DeviceUnderTest& on, const std::vector<HistoryShape>& shapes)
      : on_(on), predictor_(on.device->make_predictor(weights())) {
    std::vector<HistoryState> states;
    std::vector<Selection> selections;
    for (const HistoryShape& s : shapes) {
      histories_.emplace_back(on, s);
      states.push_back(histories_.back().state());
      const auto heads = static_cast<std::size_t>(s.num_layers * s.num_kv_heads);
      blocks_.emplace_back(
          on, std::vector<std::int32_t>(heads * static_cast<std::size_t>(s.max_per_head), -7));
      counts_.emplace_back(on, std::vector<std::int32_t>(heads, -7));
      selections.push_back({blocks_.back().data(), counts_.back().data(), s.max_per_head});
    }
    states_.emplace_back(on, states);
    selections_.emplace_back(on, selections);
  }

  // Appends rows to every map of a sequence: values [layers, maps, rows, columns].
  void append(std::size_t sequence, const std::vector<float>& values, int columns, int rows = 1) {
    const HistoryShape& s = histories_[sequence].shape();
    std::vector<float> logits = values;
    for (float& value : logits) value = std::log(value);
    const DeviceArray<float> block_max(on_, logits);
    const DeviceArray<float> lse(
        on_, std::vector<float>(static_cast<std::size_t>(s.num_layers * s.num_maps() * rows)));
    const DeviceArray<std::int32_t> num_columns(on_, {columns});
    HistoryAppendArgs args{};
    args.states = states_[0].data() + sequence;
    args.num_sequences = 1;
    args.block_max = block_max.data();
    args.lse = lse.data();
    args.rows = rows;
    args.pitch = columns;
    args.num_heads = s.num_maps();
    args.num_columns = num_columns.data();
    args.num_layers = s.num_layers;
    on_.run(&Device::history_append, args);
  }

  PredictArgs args() {
    return {predictor_.get(), states_[0].data(), selections_[0].data(),
            static_cast<int>(histories_.size())};
  }
  void predict() { on_.run(&Device::predict, args()); }
  // One call a sequence: the CPU device wants the sequences of a call to be of one shape.
  void predict_each() {
    for (std::size_t i = 0; i < histories_.size(); ++i) {
      PredictArgs one = args();
      one.states += i;
      one.selections += i;
      one.rows = 1;
      on_.run(&Device::predict, one);
    }
  }

  std::vector<int> selected(std::size_t sequence, int head_of_layers) const {
    const auto count = counts_[sequence].get()[static_cast<std::size_t>(head_of_layers)];
    const auto blocks = blocks_[sequence].get();
    const auto first = blocks.begin() + static_cast<std::ptrdiff_t>(head_of_layers) *
                                            histories_[sequence].shape().max_per_head;
    return {first, first + count};
  }
  HistoryOnDevice& history(std::size_t sequence) { return histories_[sequence]; }
  const HistoryState* states() const { return states_[0].data(); }
  std::size_t size() const { return histories_.size(); }

 private:
  DeviceUnderTest& on_;
  std::unique_ptr<Predictor> predictor_;
  std::vector<HistoryOnDevice> histories_;
  std::vector<DeviceArray<std::int32_t>> blocks_;
  std::vector<DeviceArray<std::int32_t>> counts_;
  std::vector<DeviceArray<HistoryState>> states_;
  std::vector<DeviceArray<Selection>> selections_;
};

// Sums and scores of the candidates of a map, as the CUDA device keeps them.
struct CudaSums {
  std::vector<std::int32_t> inner;
  std::vector<std::int32_t> scores;
};
CudaSums cuda_sums(const HistoryOnDevice& history, int layer, int map) {
  const HistoryShape& s = history.shape();
  const std::vector<std::byte> stream = history.stream();
  const auto candidates = static_cast<std::size_t>(
      cuda::num_candidates(history.num_columns()[static_cast<std::size_t>(layer)]));
  const std::byte* state = stream.data() + static_cast<std::size_t>(layer * s.num_maps() + map) *
                                               cuda::map_bytes(s.max_columns);
  CudaSums out{std::vector<std::int32_t>(candidates), std::vector<std::int32_t>(candidates)};
  std::memcpy(out.inner.data(), state + cuda::sums_offset(), candidates * 4);
  std::memcpy(out.scores.data(), state + cuda::scores_offset(s.max_columns), candidates * 4);
  return out;
}
// Whether the window holds values alone, so that the scores mean something.
bool is_clean(const HistoryOnDevice& history, int layer, int map) {
  const HistoryShape& s = history.shape();
  const std::vector<std::byte> stream = history.stream();
  cuda::MapHeader header{};
  std::memcpy(&header,
              stream.data() + static_cast<std::size_t>(layer * s.num_maps() + map) *
                                  cuda::map_bytes(s.max_columns),
              sizeof header);
  return history.num_rows()[static_cast<std::size_t>(layer)] >= header.clean_from;
}
std::vector<float> cuda_scores(const HistoryOnDevice& history, int layer, int map) {
  const CudaSums sums = cuda_sums(history, layer, map);
  std::vector<float> scores(sums.inner.size());
  for (std::size_t c = 0; c < scores.size(); ++c) {
    scores[c] =
        static_cast<float>(weights().conv3_bias + static_cast<double>(sums.scores[c]) /
                                                      (1 << cuda::kFixedPointBits) / kHistoryRows);
  }
  return scores;
}
// The CPU's memory is the host's, and a repeated update changes nothing.
std::vector<float> cpu_scores(const HistoryOnDevice& history, int layer, int map) {
  static const CnnFilters filters(weights());
  MapStream stream;
  stream.update(filters, history.state(), layer, map);
  return {stream.scores().begin(), stream.scores().end()};
}

int num_common(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return static_cast<int>(both.size());
}

class CudaPredict : public CudaTest {};

// What a history of this type holds of the values.
std::vector<float> as_held(HistoryType type, std::vector<float> values) {
  std::vector<std::byte> stored(values.size() * bytes_of(type));
  encode_history(type, values.data(), static_cast<int>(values.size()), stored.data());
  decode_history(type, stored.data(), 0, static_cast<int>(values.size()), values.data());
  return values;
}

// ---- golden data -----------------------------------------------------------------------------

// Golden scores are torch's of unrounded rows in fp32. A difference has two parts: what the type
// rounds of the history, which the CPU device has too, and the evaluation of equal values.
class CudaPredictGolden : public CudaTest, public testing::WithParamInterface<HistoryType> {};

TEST_P(CudaPredictGolden, ScoresAndChoicesAgreeOver200StepsWithEnteringColumns) {
  const HistoryType type = GetParam();
  const predictor::Golden golden = predictor::read_golden();
  ASSERT_GE(golden.steps, 200);
  Pair pair;
  const std::vector<HistoryShape> shapes = {{.num_kv_heads = golden.maps,
                                             .max_columns = golden.columns,
                                             .top_k = golden.k,
                                             .max_per_head = golden.k,
                                             .type = type}};
  Batch batch(pair.cuda, shapes);
  Batch same_history(pair.cpu, shapes);
  const auto append = [&](const std::vector<float>& row, int columns) {
    batch.append(0, as_held(type, row), columns);
    same_history.append(0, as_held(type, row), columns);
  };
  for (int r = 0; r < kHistoryRows; ++r) {
    std::vector<float> row;
    for (int m = 0; m < golden.maps; ++m) {
      const auto values = golden.prefill_row(m, r);
      row.insert(row.end(), values.begin(), values.end());
    }
    append(row, golden.prefill_columns);
  }
  double max_error = 0;
  double max_of_evaluation = 0;
  int common = 0;
  for (int step = 0; step < golden.steps; ++step) {
    batch.predict();
    for (int m = 0; m < golden.maps; ++m) {
      const auto scores = cuda_scores(batch.history(0), 0, m);
      const auto cpu = cpu_scores(same_history.history(0), 0, m);
      ASSERT_EQ(scores.size(), cpu.size());
      for (std::size_t c = 0; c < scores.size(); ++c) {
        const double error =
            std::abs(scores[c] - golden.score(step, m, kSink + static_cast<int>(c)));
        max_error = std::max(max_error, error);
        max_of_evaluation =
            std::max(max_of_evaluation, static_cast<double>(std::abs(scores[c] - cpu[c])));
      }
      const auto best = golden.best(step, m);
      std::vector<int> expected(best.begin(), best.end());
      std::sort(expected.begin(), expected.end());
      common += num_common(batch.selected(0, m), expected);
    }
    const int columns = blocks_for(golden.length[static_cast<std::size_t>(step)]);
    std::vector<float> row;
    for (int m = 0; m < golden.maps; ++m) {
      const auto values = golden.step_rows(step).subspan(
          static_cast<std::size_t>(m * golden.columns), static_cast<std::size_t>(columns));
      row.insert(row.end(), values.begin(), values.end());
    }
    append(row, columns);
  }
  const double overlap = static_cast<double>(common) / (golden.steps * golden.maps * golden.k);
  std::printf("max error %.2e, of the evaluation %.2e, top-%d overlap %.4f %%\n", max_error,
              max_of_evaluation, golden.k, 100 * overlap);
  EXPECT_LE(max_of_evaluation, kScoreTolerance);
  // The rounding's bounds are those of tests/predictor/streaming_test.cc.
  const double rounding = type == HistoryType::kFp32 ? 0 : type == HistoryType::kBf16 ? 1e-3 : 1e-2;
  EXPECT_LE(max_error, kScoreTolerance + rounding);
  EXPECT_GE(overlap, type == HistoryType::kE5m3 ? 0.98 : 0.999);
  EXPECT_EQ(batch.history(0).fallbacks(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Types, CudaPredictGolden,
                         testing::Values(HistoryType::kFp32, HistoryType::kBf16,
                                         HistoryType::kE5m3));

// ---- the CPU device --------------------------------------------------------------------------

// Heavy-tailed, and every other dozen of columns is idle, so that hot and cold segments both occur;
// values that the type holds exactly, so that both devices have the same history.
std::vector<float> random_values(const HistoryShape& s, int columns, std::mt19937& random,
                                 int rows = 1) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(s.num_layers * s.num_maps() * rows * columns));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const bool idle = i % static_cast<std::size_t>(columns) / 12 % 2 == 1;
    const float value = std::min(1.0F, std::exp(2.0F * normal(random) - 6.0F));
    values[i] = idle ? 1e-4F * value : value;
  }
  return as_held(s.type, std::move(values));
}

// The same sequences on both devices.
class Twins {
 public:
  Twins(DeviceUnderTest& cpu_device, DeviceUnderTest& cuda_device,
        const std::vector<HistoryShape>& shapes)
      : cpu(cpu_device, shapes), cuda(cuda_device, shapes), shapes_(shapes), random_(kSeed) {}

  void append(std::size_t sequence, int columns) {
    append(sequence, random_values(shapes_[sequence], columns, random_), columns);
  }
  void append(std::size_t sequence, const std::vector<float>& values, int columns) {
    cpu.append(sequence, values, columns);
    cuda.append(sequence, values, columns);
  }
  void predict() {
    cpu.predict_each();
    cuda.predict();
  }
  // Scores within the tolerance, counts the blocks that both chose.
  void compare(const char* what) {
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      const HistoryShape& s = shapes_[i];
      EXPECT_EQ(cuda.history(i).fallbacks(), cpu.history(i).fallbacks()) << what;
      for (int head = 0; head < s.num_layers * s.num_kv_heads; ++head) {
        const auto want = cpu.selected(i, head);
        const auto got = cuda.selected(i, head);
        EXPECT_TRUE(std::is_sorted(got.begin(), got.end())) << what;
        EXPECT_LE(got.size(), static_cast<std::size_t>(s.max_per_head)) << what;
        common += num_common(got, want);
        chosen += static_cast<int>(std::max(want.size(), got.size()));
      }
      for (int layer = 0; layer < s.num_layers; ++layer) {
        for (int map = 0; map < s.num_maps(); ++map) compare_scores(i, layer, map, what);
      }
    }
  }
  double overlap() const { return chosen == 0 ? 1 : static_cast<double>(common) / chosen; }

  Batch cpu;
  Batch cuda;
  int common = 0;
  int chosen = 0;
  int not_compared = 0;  // maps whose window holds what is no value

 private:
  void compare_scores(std::size_t sequence, int layer, int map, const char* what) {
    const auto columns = cpu.history(sequence).num_columns()[static_cast<std::size_t>(layer)];
    if (num_candidates(columns) <= shapes_[sequence].top_k) return;  // none are made
    if (!is_clean(cuda.history(sequence), layer, map)) {
      ++not_compared;
      return;
    }
    const auto want = cpu_scores(cpu.history(sequence), layer, map);
    const auto got = cuda_scores(cuda.history(sequence), layer, map);
    ASSERT_EQ(got.size(), want.size());
    for (std::size_t c = 0; c < want.size(); ++c) {
      ASSERT_NEAR(got[c], want[c], kScoreTolerance + kRelativeTolerance * std::abs(want[c]))
          << what << ", sequence " << sequence << " layer " << layer << " map " << map << " column "
          << c << " of " << want.size();
    }
  }

  std::vector<HistoryShape> shapes_;
  std::mt19937 random_;
};

class CudaPredictTypes : public CudaTest, public testing::WithParamInterface<HistoryType> {};
INSTANTIATE_TEST_SUITE_P(Types, CudaPredictTypes,
                         testing::Values(HistoryType::kFp32, HistoryType::kBf16,
                                         HistoryType::kE5m3));

// Sequences of different lengths and shapes in one call; unions of query heads' maps, truncated.
TEST_P(CudaPredictTypes, EqualsTheCpuForManySequences) {
  Pair pair;
  std::vector<HistoryShape> shapes = {
      {.num_layers = 2,
       .num_kv_heads = 2,
       .maps_per_kv_head = 4,
       .max_columns = 330,
       .top_k = 24,
       .max_per_head = 40},
      {.num_layers = 3, .num_kv_heads = 1, .max_columns = 75, .top_k = 8, .max_per_head = 8},
      {.num_layers = 1,
       .num_kv_heads = 3,
       .maps_per_kv_head = 2,
       .max_columns = 141,
       .top_k = 16,
       .max_per_head = 32},
      {.num_layers = 1, .num_kv_heads = 1, .max_columns = 40, .top_k = 40, .max_per_head = 40}};
  for (HistoryShape& s : shapes) s.type = GetParam();
  Twins twins(pair.cpu, pair.cuda, shapes);
  const auto columns = [&](std::size_t i, int step) {
    return shapes[i].max_columns - 5 + step / 8;
  };
  const int first_rows[] = {64, 64, 3, 70};
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    for (int r = 0; r < first_rows[i]; ++r) twins.append(i, columns(i, 0));
  }
  for (int step = 0; step < 40; ++step) {
    twins.predict();
    twins.compare(("step " + std::to_string(step)).c_str());
    for (std::size_t i = 0; i < shapes.size(); ++i) twins.append(i, columns(i, step + 1));
  }
  EXPECT_GE(twins.overlap(), 0.999);
  EXPECT_EQ(twins.not_compared, 0);
}

TEST_P(CudaPredictTypes, EqualsTheCpuAtSmallSizes) {
  Pair pair;
  for (const int candidates : {1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65}) {
    const HistoryShape shape{.max_columns = candidates + 8,
                             .top_k = std::max(1, candidates / 4),
                             .max_per_head = std::max(1, candidates / 4),
                             .type = GetParam()};
    for (const int rows : {1, 2, 5, 63, 64, 66}) {
      Twins twins(pair.cpu, pair.cuda, {shape});
      for (int r = 0; r < rows; ++r) {
        twins.append(0, shape.max_columns);
        // Every other run slides from the first row on; the rest start anew at the end.
        if (rows % 2 == 1 || r + 1 == rows) twins.predict();
      }
      twins.compare(
          (std::to_string(candidates) + " candidates, " + std::to_string(rows) + " rows").c_str());
    }
  }
}

TEST_P(CudaPredictTypes, SurvivesSkippedRowsRepeatedCallsAndManyNewColumns) {
  Pair pair;
  const HistoryShape shape{.max_columns = 200, .top_k = 4, .max_per_head = 4, .type = GetParam()};
  Twins twins(pair.cpu, pair.cuda, {shape});
  const auto append = [&](int rows, int columns) {
    for (int i = 0; i < rows; ++i) twins.append(0, columns);
  };
  const auto check = [&](const char* what) {
    twins.predict();
    twins.compare(what);
  };
  append(64, 20);
  check("first");
  check("repeated");
  append(1, 20);
  check("slid");
  append(2, 20);
  check("a row skipped");
  append(80, 20);
  check("more than a window skipped");
  append(1, 21);
  check("a new column");
  append(1, 150);
  check("many new columns");
  append(1, 200);
  check("the greatest length");
  EXPECT_EQ(twins.not_compared, 0);
}

// More candidates than the choice keeps in registers, and more chosen than it has threads.
TEST_F(CudaPredict, EqualsTheCpuAtTheGreatestSizes) {
  Pair pair;
  for (const int k : {56, 250, 1000}) {
    const HistoryShape shape{.num_kv_heads = 2, .max_columns = 9000, .top_k = k, .max_per_head = k};
    Twins twins(pair.cpu, pair.cuda, {shape});
    for (int r = 0; r < 64; ++r) twins.append(0, 8998);
    for (int step = 0; step < 3; ++step) {
      twins.predict();
      twins.compare(("k " + std::to_string(k)).c_str());
      twins.append(0, 8999 + step / 2);
    }
    EXPECT_GE(twins.overlap(), 0.999);
  }
}

// ---- exactness -------------------------------------------------------------------------------

// The choice by its definition, from the sums that the device has made.
std::vector<int> plain_choice(const HistoryOnDevice& history, int layer, int kv_head) {
  using Scored = std::pair<std::int64_t, int>;  // minus the score, candidate: the best is the least
  const HistoryShape& s = history.shape();
  const auto keep_best = [](std::vector<Scored>& all, int count) {
    std::sort(all.begin(), all.end());
    all.resize(std::min(all.size(), static_cast<std::size_t>(count)));
  };
  std::map<int, std::int64_t> wanted;
  for (int m = kv_head * s.maps_per_kv_head; m < (kv_head + 1) * s.maps_per_kv_head; ++m) {
    const CudaSums sums = cuda_sums(history, layer, m);
    std::vector<Scored> all;
    for (std::size_t c = 0; c < sums.inner.size(); ++c) {
      all.emplace_back(-std::int64_t{sums.scores[c]}, static_cast<int>(c));
    }
    keep_best(all, s.top_k);
    for (const auto& [score, c] : all) {
      wanted[c] = std::min(wanted.try_emplace(c, score).first->second, score);
    }
  }
  std::vector<Scored> united;
  for (const auto& [c, score] : wanted) united.emplace_back(score, c);
  keep_best(united, s.max_per_head);
  std::vector<int> blocks;
  for (const auto& [score, c] : united) blocks.push_back(c + kSink);
  std::sort(blocks.begin(), blocks.end());
  return blocks;
}

// What fp16 operands or int32 sums might not hold: one weight, or an output of many in range.
TEST(CnnTables, RefuseWeightsOutOfRange) {
  const auto refused = [](const PredictorWeights& of) {
    try {
      cuda::make_cnn_tables(of);
    } catch (const Exception& e) {
      EXPECT_EQ(e.error().code, ErrorCode::kModelFile);
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(refused(weights()), "");
  PredictorWeights great = weights();
  great.conv2_weight[5] = 65;
  EXPECT_NE(refused(great).find("predictor weights: 65"), std::string::npos) << refused(great);
  great.conv2_weight[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(refused(great).find("predictor weights: nan"), std::string::npos) << refused(great);
  PredictorWeights biased = weights();
  for (float& bias : biased.conv2_bias) bias = 60;
  for (float& weight : biased.conv3_weight) weight = 60;
  EXPECT_NE(refused(biased).find("biases' share"), std::string::npos) << refused(biased);
}

// Where the cold stencils' s would pass what sums hold, none is cold: the network's is cut off.
TEST(CnnTables, LetNothingBeColdThatIsNotBounded) {
  PredictorWeights great = weights();
  EXPECT_GT(cuda::make_cnn_tables(great).cold_limit[cuda::kPlainBf16], 0U);
  for (float& bias : great.conv2_bias) bias = 10;
  for (float& weight : great.conv3_weight) weight = 0.05F;  // s is about 32 x 10 x 0.05
  for (const std::uint32_t limit : cuda::make_cnn_tables(great).cold_limit) EXPECT_EQ(limit, 0U);
  for (float& weight : great.conv3_weight) weight = 0.01F;
  for (const std::uint32_t limit : cuda::make_cnn_tables(great).cold_limit) EXPECT_GT(limit, 0U);
}

// Whatever scores do from step to step: with a list of what was best a step ago, or without; unions
// that fit shared memory, and one that doesn't; maps taken together, and more than there are warps.
TEST_F(CudaPredict, ChoosesExactlyByItsSumsWhereScoresJump) {
  Pair pair;
  const std::vector<HistoryShape> shapes = {
      {.num_kv_heads = 2,
       .maps_per_kv_head = 4,
       .max_columns = 3000,
       .top_k = 100,
       .max_per_head = 150},
      {.num_layers = 2, .num_kv_heads = 1, .max_columns = 9001, .top_k = 56, .max_per_head = 56},
      {.num_kv_heads = 1,
       .maps_per_kv_head = 4,
       .max_columns = 9000,
       .top_k = 900,
       .max_per_head = 1000},
      {.num_kv_heads = 1,
       .maps_per_kv_head = 7,
       .max_columns = 500,
       .top_k = 20,
       .max_per_head = 20},
      {.num_kv_heads = 2,
       .maps_per_kv_head = 3,
       .max_columns = 2000,
       .top_k = 40,
       .max_per_head = 25},
      {.num_kv_heads = 1,
       .maps_per_kv_head = 17,
       .max_columns = 300,
       .top_k = 20,
       .max_per_head = 30}};
  Batch batch(pair.cuda, shapes);
  std::mt19937 random(kSeed);
  const auto append = [&](float scale) {
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      std::vector<float> values = random_values(shapes[i], shapes[i].max_columns, random);
      for (float& value : values) value = std::min(1.0F, value * scale);
      batch.append(i, values, shapes[i].max_columns);
    }
  };
  for (int row = 0; row < kHistoryRows; ++row) append(1);
  for (const float scale : {1.0F, 1.0F, 1.0F, 30.0F, 30.0F, 1e-3F, 1e-3F, 1.0F, 1e-5F, 30.0F}) {
    for (int step = 0; step < 3; ++step) {
      batch.predict();
      for (std::size_t i = 0; i < shapes.size(); ++i) {
        for (int head = 0; head < shapes[i].num_layers * shapes[i].num_kv_heads; ++head) {
          const int layer = head / shapes[i].num_kv_heads;
          ASSERT_EQ(batch.selected(i, head),
                    plain_choice(batch.history(i), layer, head % shapes[i].num_kv_heads))
              << "sequence " << i << " head " << head << " scale " << scale << " step " << step;
        }
      }
      append(scale);
    }
  }
}

TEST_P(CudaPredictTypes, SumsStayBitEqualToNewOnesWhileColumnsEnter) {
  Pair pair;
  const HistoryShape shape{
      .num_kv_heads = 3, .max_columns = 190, .top_k = 8, .max_per_head = 8, .type = GetParam()};
  Batch batch(pair.cuda, {shape});
  std::mt19937 random(kSeed);
  constexpr int kSteps = 200;
  int compared = 0;
  for (int step = 0; step < kHistoryRows + kSteps; ++step) {
    const int columns = 170 + step / 16;
    batch.append(0, random_values(shape, columns, random), columns);
    if (step < kHistoryRows - 1) continue;
    batch.predict();
    if (step % 16 > 1 && step % 8 != 7) continue;
    std::vector<CudaSums> slid;
    for (int m = 0; m < shape.num_maps(); ++m) slid.push_back(cuda_sums(batch.history(0), 0, m));
    batch.history(0).forget_sums();
    batch.predict();
    for (int m = 0; m < shape.num_maps(); ++m) {
      const CudaSums anew = cuda_sums(batch.history(0), 0, m);
      ASSERT_EQ(anew.inner, slid[static_cast<std::size_t>(m)].inner) << "step " << step;
      ASSERT_EQ(anew.scores, slid[static_cast<std::size_t>(m)].scores) << "step " << step;
    }
    ++compared;
  }
  EXPECT_GT(compared, 40);
}

// A value that is no probability makes scores unusable until its row has left, and no longer.
TEST_P(CudaPredictTypes, DistrustsAWindowWithAValueThatIsNone) {
  struct Case {
    float bad;
    int max_per_head;  // 5: while both maps are clean, they are taken together
  };
  Pair pair;
  for (const auto [bad, max_per_head] :
       {Case{std::numeric_limits<float>::quiet_NaN(), 7},
        Case{std::numeric_limits<float>::infinity(), 5}, Case{3.0F, 7}, Case{3.0F, 5}}) {
    const HistoryShape shape{.maps_per_kv_head = 2,
                             .max_columns = 60,
                             .top_k = 5,
                             .max_per_head = max_per_head,
                             .type = GetParam()};
    Twins twins(pair.cpu, pair.cuda, {shape});
    for (int r = 0; r < 64; ++r) twins.append(0, 60);
    twins.predict();
    std::mt19937 random(kSeed);
    std::vector<float> row = random_values(shape, 60, random);
    row[30] = bad;  // of the first map alone
    twins.append(0, row, 60);
    for (int step = 0; step < 66; ++step) {
      twins.predict();
      twins.compare("bad value");
      twins.append(0, 60);
    }
    EXPECT_EQ(twins.cuda.history(0).fallbacks(), 64U) << bad;
    EXPECT_EQ(twins.not_compared, 64) << bad;
    EXPECT_GE(twins.overlap(), 0.999);
  }
}

// Wherever it lies: at the edges of spans and of pairs of them, in whole pairs and in the last one.
TEST_P(CudaPredictTypes, DistrustsItInEverySpan) {
  Pair pair;
  constexpr int kColumns = 400;
  constexpr int kLast = kColumns - (kSinkTokens + kLocalTokens) / kBlockTokens - 1;
  const HistoryShape shape{
      .max_columns = kColumns, .top_k = 5, .max_per_head = 7, .type = GetParam()};
  for (const int candidate : {0, 1, 63, 64, 127, 128, 130, 250, 300, kLast}) {
    Batch batch(pair.cuda, {shape});
    std::mt19937 random(kSeed);
    for (int r = 0; r < 64; ++r) {
      batch.append(0, random_values(shape, kColumns, random), kColumns);
    }
    batch.predict();
    ASSERT_EQ(batch.history(0).fallbacks(), 0U);
    std::vector<float> row = random_values(shape, kColumns, random);
    row[static_cast<std::size_t>(kSinkTokens / kBlockTokens + candidate)] = 3.0F;
    batch.append(0, row, kColumns);
    batch.predict();
    EXPECT_EQ(batch.history(0).fallbacks(), 1U) << "candidate " << candidate;
  }
}

// Two batches of the same histories: sums, what they stand for and choices are equal to the bit.
void expect_equal(Batch& got, Batch& want, const char* what) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    const HistoryShape& s = want.history(i).shape();
    EXPECT_EQ(got.history(i).fallbacks(), want.history(i).fallbacks()) << what;
    for (int head = 0; head < s.num_layers * s.num_kv_heads; ++head) {
      ASSERT_EQ(got.selected(i, head), want.selected(i, head))
          << what << ", sequence " << i << " head " << head;
    }
    for (int map = 0; map < s.num_layers * s.num_maps(); ++map) {
      const int layer = map / s.num_maps();
      const CudaSums got_sums = cuda_sums(got.history(i), layer, map % s.num_maps());
      const CudaSums want_sums = cuda_sums(want.history(i), layer, map % s.num_maps());
      ASSERT_EQ(got_sums.inner, want_sums.inner) << what << ", sequence " << i << " map " << map;
      ASSERT_EQ(got_sums.scores, want_sums.scores) << what << ", sequence " << i << " map " << map;
    }
  }
}

// More lists than a sequence has, and more tasks than warps: a warp goes from list to list.
TEST_P(CudaPredictTypes, ChoosesForManySequencesAsForEachAlone) {
  Pair pair;
  std::vector<HistoryShape> shapes;
  for (int i = 0; i < 40; ++i) {
    shapes.push_back({.num_layers = 1 + i % 3,
                      .num_kv_heads = 1 + i % 2,
                      .maps_per_kv_head = 1 + i / 2 % 2,
                      .max_columns = 300 + 37 * i,
                      .top_k = 20 + i,
                      .max_per_head = 30 + i,
                      .type = GetParam()});
  }
  Batch together(pair.cuda, shapes);
  Batch alone(pair.cuda, shapes);
  std::mt19937 random(kSeed);
  for (int step = 0; step < 4; ++step) {
    const int rows = step == 0 ? kHistoryRows : 1;
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      const int columns = shapes[i].max_columns - 4 + step;
      const std::vector<float> values = random_values(shapes[i], columns, random, rows);
      together.append(i, values, columns, rows);
      alone.append(i, values, columns, rows);
    }
    together.predict();
    alone.predict_each();
    expect_equal(together, alone, ("step " + std::to_string(step)).c_str());
  }
}

TEST_F(CudaPredict, ChoosesForAsManySequencesAsOneCallTakes) {
  Pair pair;
  const HistoryShape shape{.max_columns = 40, .top_k = 4, .max_per_head = 4};
  const std::vector<HistoryShape> shapes(kMaxPredictSequences, shape);
  Batch together(pair.cuda, shapes);
  Batch alone(pair.cuda, shapes);
  std::mt19937 random(kSeed);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const std::vector<float> values = random_values(shape, 40, random, kHistoryRows);
    together.append(i, values, 40, kHistoryRows);
    alone.append(i, values, 40, kHistoryRows);
  }
  together.predict();
  alone.predict_each();
  expect_equal(together, alone, "1024 sequences");
}

// A step's rows and the choice from them, where nobody waits between them: by block and by slot.
TEST_F(CudaPredict, WaitsForTheRowsThatAreBeingAppended) {
  Pair pair;
  DeviceUnderTest& on = pair.cuda;
  constexpr int kColumns = 4000;
  constexpr int kSlots = 300;
  const HistoryShape shape{
      .num_layers = 6, .num_kv_heads = 4, .max_columns = kColumns, .top_k = 50, .max_per_head = 50};
  const auto maps = static_cast<std::size_t>(shape.num_layers * shape.num_maps());
  std::mt19937 random(kSeed);
  for (const bool by_slot : {false, true}) {
    Batch waits(on, {shape});
    Batch runs(on, {shape});
    const std::vector<float> first = random_values(shape, kColumns, random, kHistoryRows);
    waits.append(0, first, kColumns, kHistoryRows);
    runs.append(0, first, kColumns, kHistoryRows);

    const std::size_t pitch = by_slot ? kSlots : kColumns;
    const DeviceArray<float> maxima(on, std::vector<float>(maps * pitch));
    const DeviceArray<float> lse(on, std::vector<float>(maps));
    const DeviceArray<std::int32_t> columns(on, {kColumns});
    const DeviceArray<std::int32_t> blocks(on, std::vector<std::int32_t>(maps * kSlots));
    SequenceKv kv{};
    kv.slot_to_block = blocks.data();
    kv.num_slots = kSlots;
    kv.shape.num_layers = shape.num_layers;
    kv.shape.num_kv_heads = shape.num_kv_heads;
    kv.block_max = maxima.data();
    const DeviceArray<SequenceKv> sequences(on, {kv});
    const auto append_args = [&](const Batch& to) {
      HistoryAppendArgs args{};
      args.states = to.states();
      args.num_sequences = 1;
      args.block_max = by_slot ? nullptr : maxima.data();
      args.lse = lse.data();
      args.rows = 1;
      args.pitch = kColumns;
      args.sequences = sequences.data();
      args.num_heads = shape.num_maps();
      args.num_columns = columns.data();
      args.num_layers = shape.num_layers;
      return args;
    };
    const auto enqueue = [&] {
      on.device->history_append(append_args(runs), *on.stream);
      on.device->predict(runs.args(), *on.stream);
    };
    std::unique_ptr<Graph> graph;
    for (int step = 0; step < 30; ++step) {
      std::vector<float> logits = random_values(shape, static_cast<int>(pitch), random);
      for (float& value : logits) value = std::log(value);
      maxima.set(logits);
      std::vector<std::int32_t> table;
      for (std::size_t map = 0; map < maps; ++map) {
        std::vector<std::int32_t> all(kColumns);
        std::iota(all.begin(), all.end(), 0);
        std::sample(all.begin(), all.end(), std::back_inserter(table), kSlots, random);
      }
      blocks.set(table);
      on.run(&Device::history_append, append_args(waits));
      waits.predict();
      if (step == 0) {
        enqueue();
        on.stream->synchronize();
        graph = on.device->record(*on.stream, enqueue);
      } else {
        graph->launch(*on.stream);
        on.stream->synchronize();
      }
      expect_equal(runs, waits, by_slot ? "by slot" : "by block");
    }
  }
}

TEST_F(CudaPredict, RunsFromARecordedGraph) {
  Pair pair;
  const HistoryShape shape{.num_kv_heads = 2, .max_columns = 120, .top_k = 9, .max_per_head = 9};
  Twins twins(pair.cpu, pair.cuda, {shape});
  for (int r = 0; r < 64; ++r) twins.append(0, 100);
  twins.predict();
  const auto graph = pair.cuda.device->record(
      *pair.cuda.stream, [&] { pair.cuda.device->predict(twins.cuda.args(), *pair.cuda.stream); });
  for (int step = 0; step < 20; ++step) {
    twins.append(0, 101 + step / 2);
    twins.cpu.predict_each();
    graph->launch(*pair.cuda.stream);
    pair.cuda.stream->synchronize();
    twins.compare("from a graph");
  }
}

}  // namespace
}  // namespace foretoken::kernels
