// Scores of segments on the CUDA device: of sums that it is given, against what the CPU notes of
// the same ones; and behind a prediction, against the CPU's.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/cpu/best_blocks.h"
#include "kernels/cuda/map_layout.h"
#include "kernels/cuda/ops.h"
#include "predictor/weights.h"
#include "tests/kernels/cuda/history_on_device.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261129;
constexpr std::int64_t kRows = 100;  // appended so far, of every map

// A choice in the host's memory.
struct HostSelection {
  HostSelection(const HistoryShape& shape, int max_segments)
      : blocks(heads(shape) * static_cast<std::size_t>(shape.max_per_head)),
        counts(heads(shape)),
        scores(heads(shape) * static_cast<std::size_t>(max_segments)),
        view{blocks.data(), counts.data(), shape.max_per_head, scores.data(), max_segments} {}
  static std::size_t heads(const HistoryShape& shape) {
    return static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads);
  }
  std::vector<std::int32_t> blocks;
  std::vector<std::int32_t> counts;
  std::vector<float> scores;
  Selection view;
};

// ... and on a device.
struct DeviceSelection {
  DeviceSelection(DeviceUnderTest& on, const HostSelection& host)
      : blocks(on, host.blocks),
        counts(on, host.counts),
        scores(on, std::vector<float>(host.scores.size(), -7.0F)),
        view{blocks.data(), counts.data(), host.view.max_selected, scores.data(),
             host.view.max_segments} {}
  DeviceArray<std::int32_t> blocks;
  DeviceArray<std::int32_t> counts;
  DeviceArray<float> scores;
  Selection view;
};

// With this bias.
std::unique_ptr<Predictor> predictor_of(float conv3_bias, Device& device) {
  auto weights = predictor::read_weights(predictor::published_weights()).value_or_throw();
  weights.conv3_bias = conv3_bias;
  return device.make_predictor(weights);
}

// Sums that nobody has computed, in a history's state on the GPU.
struct Sums {
  Sums(const HistoryShape& of, int with_columns)
      : shape(of), columns(with_columns), state(maps() * map_bytes()) {
    std::mt19937 random(kSeed);
    std::normal_distribution<double> normal;
    for (std::size_t map = 0; map < maps(); ++map) {
      cuda::MapHeader header{};
      header.num_rows = kRows;
      header.clean_from = map % 5 == 3 ? kRows + 1 : 0;  // one of five
      header.columns = candidates();
      std::memcpy(state.data() + map * map_bytes(), &header, sizeof header);
      for (int c = 0; c < candidates(); ++c) {
        set_score(map, c, normal(random));
      }
    }
  }
  std::size_t maps() const { return static_cast<std::size_t>(shape.num_layers * shape.num_maps()); }
  std::size_t map_bytes() const { return cuda::map_bytes(shape.max_columns); }
  int candidates() const { return cuda::num_candidates(columns); }
  bool usable(int map) const { return map % 5 != 3; }

  std::size_t scores_of(std::size_t map) const {
    return map * map_bytes() + cuda::scores_offset(shape.max_columns);
  }
  void set_score(std::size_t map, int column, double value) {
    const auto score = static_cast<std::int32_t>(value * 3e6);
    std::memcpy(state.data() + scores_of(map) + 4 * static_cast<std::size_t>(column), &score, 4);
  }
  std::vector<float> scores(int map, float bias) const {
    const auto count = static_cast<std::size_t>(candidates());
    std::vector<std::int32_t> kept(count);
    std::memcpy(kept.data(), state.data() + scores_of(static_cast<std::size_t>(map)), count * 4);
    std::vector<float> scores(count);
    for (std::size_t c = 0; c < count; ++c) {
      scores[c] = static_cast<float>(bias + static_cast<double>(kept[c]) /
                                                (1 << cuda::kFixedPointBits) / kHistoryRows);
    }
    return scores;
  }

  HistoryShape shape;
  int columns;
  std::vector<std::byte> state;
};

// The CPU's choice by these sums, and what it notes of them.
HostSelection expected(const Sums& sums, float bias, int max_segments) {
  const HistoryShape& s = sums.shape;
  HostSelection out(s, max_segments);
  for (int head = 0; head < s.num_layers * s.num_kv_heads; ++head) {
    HeadChoice choice;
    choice.start(sums.candidates());
    std::vector<std::vector<float>> noted;
    for (int m = 0; m < s.maps_per_kv_head; ++m) {
      const int map = head * s.maps_per_kv_head + m;
      if (sums.candidates() <= s.top_k || !sums.usable(map)) {
        choice.add_latest(std::min(s.top_k, sums.candidates()));
        continue;
      }
      noted.push_back(sums.scores(map, bias));
      choice.add_best(noted.back(), s.top_k);
    }
    choice.finish(head / s.num_kv_heads, s.num_kv_heads, head % s.num_kv_heads, s.max_per_head,
                  out.view);
    const std::span<float> scores(
        out.scores.data() + static_cast<std::ptrdiff_t>(head) * max_segments,
        static_cast<std::size_t>(max_segments));
    for (const auto& map : noted) choice.note_segments(map, scores);
  }
  return out;
}

// The GPU's, of the same choice.
std::vector<float> scores_on(DeviceUnderTest& cuda, const Sums& sums, float conv3_bias,
                             const HostSelection& choice) {
  const auto layers = static_cast<std::size_t>(sums.shape.num_layers);
  const HistoryOnDevice history(cuda, sums.shape);
  const DeviceArray<std::byte> stream(cuda, sums.state);
  const DeviceArray<std::int64_t> rows(cuda, std::vector<std::int64_t>(layers, kRows));
  const DeviceArray<std::int32_t> columns(cuda, std::vector<std::int32_t>(layers, sums.columns));
  HistoryState state = history.state();
  state.stream = stream.data();
  state.num_rows = rows.data();
  state.num_columns = columns.data();
  const DeviceSelection selection(cuda, choice);
  Selection none = selection.view;  // another sequence of the batch wants no scores
  none.segment_scores = nullptr;
  const DeviceArray<HistoryState> states(cuda, {state, state});
  const DeviceArray<Selection> selections(cuda, {none, selection.view});
  const auto predictor = predictor_of(conv3_bias, *cuda.device);
  cuda::score_segments({predictor.get(), states.data(), selections.data(), 2, true},
                       cuda::as_cuda(*cuda.stream));
  cuda.stream->synchronize();
  return selection.scores.get();
}

class CudaSegmentScores : public CudaTest {};

TEST_F(CudaSegmentScores, AreWhatTheCpuNotesOfTheSameSums) {
  Pair pair;
  struct Case {
    HistoryShape shape;
    int columns;
    int max_segments;
  };
  const std::vector<Case> cases{
      {{.num_layers = 3, .num_kv_heads = 2, .max_columns = 330, .top_k = 24, .max_per_head = 24},
       300,
       21},
      {{.num_layers = 2,
        .num_kv_heads = 3,
        .maps_per_kv_head = 4,
        .max_columns = 2100,
        .top_k = 16,
        .max_per_head = 40},
       2099,
       140},
      {{.num_layers = 1, .num_kv_heads = 400, .max_columns = 25, .top_k = 4, .max_per_head = 4},
       13,
       2},
      {{.num_kv_heads = 2, .max_columns = 65536, .top_k = 250, .max_per_head = 250}, 65536, 4096},
      // All are chosen: no scores.
      {{.num_kv_heads = 2, .max_columns = 60, .top_k = 60, .max_per_head = 60}, 50, 5}};
  for (const Case& c : cases) {
    // Scores about zero, of which a map's lowest may be none; and all above it.
    for (const float bias : {0.0F, 0.1F}) {
      const Sums sums(c.shape, c.columns);
      const HostSelection want = expected(sums, bias, c.max_segments);
      const std::vector<float> got = scores_on(pair.cuda, sums, bias, want);
      for (std::size_t i = 0; i < got.size(); ++i) {
        // Both round the sum to a float, one before the bias is added.
        ASSERT_NEAR(got[i], want.scores[i], 1e-5F * (1 + want.scores[i]))
            << c.columns << " columns, score " << i << ", bias " << bias;
      }
      const bool scored = sums.candidates() > c.shape.top_k;
      if (bias > 0) {
        EXPECT_EQ(std::ranges::max(got) > 0, scored) << c.columns;
      }
    }
  }
}

TEST_F(CudaSegmentScores, ComeWithAPrediction) {
  Pair pair;
  const HistoryShape shape{.num_kv_heads = 4, .max_columns = 200, .top_k = 20, .max_per_head = 20};
  constexpr int kColumns = 190;
  constexpr int kSegments = 12;
  const auto weights = predictor::read_weights(predictor::published_weights()).value_or_throw();
  const HostSelection empty(shape, kSegments);
  std::vector<std::vector<float>> found;
  for (DeviceUnderTest* on : {&pair.cpu, &pair.cuda}) {
    std::mt19937 random(kSeed);
    std::normal_distribution<float> normal;
    HistoryOnDevice history(*on, shape);
    const DeviceArray<HistoryState> states(*on, {history.state()});
    const DeviceArray<float> lse(*on, std::vector<float>(4));
    const DeviceArray<std::int32_t> num_columns(*on, {kColumns});
    for (int row = 0; row < kHistoryRows; ++row) {
      std::vector<float> logits(std::size_t{4} * kColumns);
      for (float& value : logits) value = std::min(0.0F, 2.0F * normal(random) - 6.0F);
      const DeviceArray<float> block_max(*on, logits);
      HistoryAppendArgs args{};
      args.states = states.data();
      args.num_sequences = 1;
      args.block_max = block_max.data();
      args.lse = lse.data();
      args.rows = 1;
      args.pitch = kColumns;
      args.num_heads = 4;
      args.num_columns = num_columns.data();
      on->run(&Device::history_append, args);
    }
    const DeviceSelection selection(*on, empty);
    const DeviceArray<Selection> selections(*on, {selection.view});
    const auto predictor = on->device->make_predictor(weights);
    on->run(&Device::predict,
            PredictArgs{predictor.get(), states.data(), selections.data(), 1, true});
    found.push_back(selection.scores.get());
  }
  std::size_t close = 0;
  for (std::size_t i = 0; i < found[0].size(); ++i) {
    EXPECT_GE(found[1][i], 0) << i;
    if (std::abs(found[1][i] - found[0][i]) < 0.05F) ++close;
  }
  EXPECT_GT(std::ranges::max(found[0]), 0);
  // Not all: of two blocks with nearly the same score each may choose another one.
  EXPECT_GE(close, found[0].size() * 9 / 10);
}

}  // namespace
}  // namespace foretoken::kernels
