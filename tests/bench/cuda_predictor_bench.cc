// Time of the predictor a decode step on the GPU: rows appended to all maps, and blocks chosen.
//
//   cuda_predictor_bench --layers 32 --kv-heads 8 --maps-per-kv-head 4 --columns 8200
//
// Attention is synthetic: a softmax of persistent heavy-tailed block logits with noise, the same in
// all layers. The time depends on how peaked it is, which the share of hot segments says.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "common/result.h"
#include "kernels/cpu/cnn.h"
#include "kernels/device.h"
#include "predictor/weights.h"

namespace {

using namespace foretoken;
using namespace foretoken::kernels;

struct Options {
  int layers = 32;
  int kv_heads = 8;
  int maps_per_kv_head = 1;
  int columns = 8200;
  int sequences = 1;
  int top_k = 56;
  int steps = 100;
  double spread = 2.0;  // sigma of the block logits
  double mass = 0.5;    // sum of a row
  std::string history = "bf16";

  int maps() const { return kv_heads * maps_per_kv_head; }
  int max_columns() const { return columns + 8; }
  HistoryType type() const {
    return history == "fp32" ? HistoryType::kFp32
                             : (history == "bf16" ? HistoryType::kBf16 : HistoryType::kE5m3);
  }
};

// Log probabilities [maps, rows, columns].
std::vector<float> synthetic_rows(const Options& o, int rows) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto columns = static_cast<std::size_t>(o.columns);
  std::vector<float> out;
  out.reserve(static_cast<std::size_t>(o.maps() * rows) * columns);
  std::vector<float> base(columns);
  for (int map = 0; map < o.maps(); ++map) {
    for (float& x : base) x = normal(random);
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (const float x : base) {
        out.push_back(static_cast<float>(o.spread) * (0.85F * x + 0.5F * normal(random)));
        sum += std::exp(static_cast<double>(out.back()));
      }
      const auto lse = static_cast<float>(std::log(sum / o.mass));
      for (auto it = out.end() - o.columns; it != out.end(); ++it) *it -= lse;
    }
  }
  return out;
}

// Share of 5 x 8 neighbourhoods that need the whole network.
double hot_share(const std::vector<float>& logits, const Options& o, float limit) {
  const auto columns = static_cast<std::size_t>(o.columns);
  const float log_limit = std::log(limit);
  int hot = 0;
  int all = 0;
  for (std::size_t c = 2; c + 6 <= columns; c += 4, ++all) {
    bool is_hot = false;
    for (std::size_t k = 0; k < 40; ++k)
      is_hot |= logits[k / 8 * columns + c - 2 + k % 8] >= log_limit;
    hot += is_hot ? 1 : 0;
  }
  return static_cast<double>(hot) / all;
}

// Zeroed memory of one sequence's history, and what is chosen from it.
struct Sequence {
  Sequence(Device& device, Stream& stream, const Options& o) {
    const auto maps = static_cast<std::size_t>(o.layers * o.maps());
    const auto heads = static_cast<std::size_t>(o.layers * o.kv_heads);
    const int pitch = (o.max_columns() + 7) / 8 * 8;
    const int chosen = o.top_k * o.maps_per_kv_head;
    const auto make = [&](std::size_t bytes) {
      buffers.emplace_back(device, bytes, MemoryUse::kHistory);
      device.fill_zero(buffers.back().data(), bytes, stream);
      return buffers.back().data();
    };
    state.rows = static_cast<std::byte*>(
        make(maps * kRingRows * static_cast<std::size_t>(pitch) * bytes_of(o.type())));
    state.stream =
        static_cast<std::byte*>(make(maps * device.predictor_state_bytes(o.max_columns())));
    state.num_rows = static_cast<std::int64_t*>(make(static_cast<std::size_t>(o.layers) * 8));
    state.num_columns = static_cast<std::int32_t*>(make(static_cast<std::size_t>(o.layers) * 4));
    state.fallbacks = static_cast<std::uint32_t*>(make(4));
    state.num_layers = o.layers;
    state.num_kv_heads = o.kv_heads;
    state.maps_per_kv_head = o.maps_per_kv_head;
    state.max_columns = o.max_columns();
    state.pitch = pitch;
    state.top_k = o.top_k;
    state.max_per_head = chosen;
    state.type = static_cast<std::int32_t>(o.type());
    selection.blocks =
        static_cast<std::int32_t*>(make(heads * static_cast<std::size_t>(chosen) * 4));
    selection.counts = static_cast<std::int32_t*>(make(heads * 4));
    selection.max_selected = chosen;
  }
  std::vector<DeviceBuffer> buffers;
  HistoryState state{};
  Selection selection{};
};

template <typename T>
DeviceBuffer upload(Device& device, Stream& stream, const std::vector<T>& values) {
  DeviceBuffer buffer(device, values.size() * sizeof(T), MemoryUse::kHistory);
  device.copy_in(buffer.data(), values.data(), values.size() * sizeof(T), stream);
  stream.synchronize();
  return buffer;
}

class Bench {
 public:
  explicit Bench(const Options& o)
      : o_(o),
        device_(make_cuda_device({})),
        stream_(device_->make_stream(StreamKind::kCompute)),
        weights_(predictor::read_weights(predictor::published_weights()).value_or_throw()),
        predictor_(device_->make_predictor(weights_)),
        logits_(synthetic_rows(o, kHistoryRows)) {
    std::vector<HistoryState> states;
    std::vector<Selection> selections;
    for (int i = 0; i < o.sequences; ++i) {
      sequences_.emplace_back(*device_, *stream_, o);
      states.push_back(sequences_.back().state);
      selections.push_back(sequences_.back().selection);
    }
    states_ = upload(*device_, *stream_, states);
    selections_ = upload(*device_, *stream_, selections);
    block_max_ = upload(*device_, *stream_, logits_);
    lse_ =
        upload(*device_, *stream_,
               std::vector<float>(static_cast<std::size_t>(o.sequences * o.maps()) * kHistoryRows));
    columns_ = upload(*device_, *stream_,
                      std::vector<std::int32_t>(static_cast<std::size_t>(o.sequences), o.columns));
  }

  void run() {
    for (int i = 0; i < o_.sequences; ++i) append(i, 1, kHistoryRows);
    const double first = ms([&] { predict(); });
    predict();
    const double select = graph_ms([&] { predict(); });
    const double row = graph_ms([&] { append(0, 1, 1); });  // changes the history
    std::printf(
        "%s, %d x %d maps of %d columns, %s: %.1f %% hot; select %.4f ms (first %.2f), "
        "rows of a sequence %.4f ms\n",
        device_->info().name.c_str(), o_.sequences, o_.layers * o_.maps(), o_.columns,
        o_.history.c_str(), 100 * hot_share(logits_, o_, CnnFilters(weights_).bottom.cold.limit),
        select, first, row);
  }

 private:
  void append(int sequence, int num_sequences, int rows) {
    for (int layer = 0; layer < o_.layers; ++layer) {
      HistoryAppendArgs args{};
      args.states = states_.as<HistoryState>() + sequence;
      args.num_sequences = num_sequences;
      args.layer = layer;
      args.block_max = block_max_.as<float>();
      args.lse = lse_.as<float>();
      args.rows = rows;
      args.pitch = o_.columns;
      args.num_heads = o_.maps();
      args.num_columns = columns_.as<std::int32_t>();
      device_->history_append(args, *stream_);
    }
  }
  void predict() {
    device_->predict(
        {predictor_.get(), states_.as<HistoryState>(), selections_.as<Selection>(), o_.sequences},
        *stream_);
  }
  template <typename Body>
  double ms(const Body& body) {
    stream_->synchronize();
    const auto start = std::chrono::steady_clock::now();
    body();
    stream_->synchronize();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
        .count();
  }
  // The best of five runs of --steps launches of a recorded graph.
  template <typename Body>
  double graph_ms(const Body& body) {
    body();
    const auto graph = device_->record(*stream_, body);
    double best = 1e9;
    for (int i = 0; i < 5; ++i) {
      best = std::min(best, ms([&] {
                        for (int step = 0; step < o_.steps; ++step) graph->launch(*stream_);
                      }));
    }
    return best / o_.steps;
  }

  Options o_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  PredictorWeights weights_;
  std::unique_ptr<Predictor> predictor_;
  std::vector<float> logits_;
  std::vector<Sequence> sequences_;
  DeviceBuffer states_;
  DeviceBuffer selections_;
  DeviceBuffer block_max_;
  DeviceBuffer lse_;
  DeviceBuffer columns_;
};

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("Time of the predictor a decode step on the GPU, on synthetic attention");
  app.add_option("--layers", o.layers)->check(CLI::PositiveNumber);
  app.add_option("--kv-heads", o.kv_heads)->check(CLI::PositiveNumber);
  app.add_option("--maps-per-kv-head", o.maps_per_kv_head)->check(CLI::PositiveNumber);
  app.add_option("--columns", o.columns, "context in blocks")->check(CLI::Range(9, 1 << 16));
  app.add_option("--sequences", o.sequences)->check(CLI::PositiveNumber);
  app.add_option("--top-k", o.top_k)->check(CLI::PositiveNumber);
  app.add_option("--steps", o.steps)->check(CLI::PositiveNumber);
  app.add_option("--spread", o.spread, "sigma of the block logits");
  app.add_option("--mass", o.mass, "sum of a row");
  app.add_option("--history", o.history)->check(CLI::IsMember({"fp32", "bf16", "e5m3"}));
  CLI11_PARSE(app, argc, argv);
  try {
    Bench(o).run();
  } catch (const Exception& e) {
    std::fprintf(stderr, "cuda_predictor_bench: %s\n", e.what());
    return exit_code(e.error().code);
  }
}
