#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "common/ids.h"
#include "common/model_config.h"
#include "kernels/kept_blocks.h"
#include "kernels/op_timing.h"
#include "predictor/policy.h"
#include "worker/bench.h"
#include "worker/internal/make_device.h"
#include "worker/internal/upload.h"

namespace foretoken::worker {
namespace {

using Json = nlohmann::ordered_json;
using kernels::DeviceBuffer;
using kernels::MemoryUse;
using kernels::Milliseconds;

constexpr int kSteps = 16;      // in one graph
constexpr int kHotColumns = 8;  // as many as decide about two segments (docs/predictor.md)
constexpr float kHot[] = {4e-3F, 2e-2F};   // above all limits of the published weights
constexpr float kCold[] = {1e-7F, 1e-4F};  // below them

struct Case {
  int context = 0;
  double hot_percent = 0;
  predictor::PredictPer per = predictor::PredictPer::kKvHead;
  kernels::HistoryType type = kernels::HistoryType::kBf16;
};

// Attention of made-up rows: of every eight blocks of a KV head one is hot with the given
// probability, in all rows, and so are the two segments of the CNN's input that see it.
class SyntheticRows {
 public:
  SyntheticRows(int heads, int kv_heads, int columns, double hot_share)
      : heads_(heads), columns_(columns), hot_(static_cast<std::size_t>(kv_heads * columns)) {
    std::bernoulli_distribution is_hot(hot_share);
    for (std::size_t i = kernels::kSinkBlocks; i < hot_.size(); i += kHotColumns) {
      hot_[i] = is_hot(random_);
    }
  }

  // Logits' block maxima against an LSE of 0: [sequences, heads, rows, columns].
  std::vector<float> draw(int sequences, int rows) {
    const int group = heads_ * columns_ / static_cast<int>(hot_.size());
    std::vector<float> values;
    values.reserve(static_cast<std::size_t>(sequences * rows * heads_) *
                   static_cast<std::size_t>(columns_));
    for (int head = 0; head < sequences * heads_; ++head) {
      const int first = head % heads_ / group * columns_;
      for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < columns_; ++column) {
          values.push_back(value(hot_[static_cast<std::size_t>(first + column)] ? kHot : kCold));
        }
      }
    }
    return values;
  }

 private:
  float value(const float (&range)[2]) {
    const float at = static_cast<float>(random_() >> 8) * 0x1p-24F;
    return std::log(range[0]) + at * (std::log(range[1]) - std::log(range[0]));
  }

  int heads_;
  int columns_;
  std::vector<bool> hot_;
  std::mt19937 random_{1};
};

// Rows of every layer, as a decode step and the end of a prompt hand them to the policy.
struct DeviceRows {
  DeviceRows(kernels::Device& device, kernels::Stream& stream, SyntheticRows& source, int heads,
             int columns, int batch)
      : pitch(columns),
        prompt(upload(device, stream, source.draw(1, kernels::kHistoryRows), MemoryUse::kPrefill)),
        step(upload(device, stream, source.draw(batch, 1), MemoryUse::kPrefill)),
        lse(upload(device, stream,
                   std::vector<float>(
                       static_cast<std::size_t>(heads * std::max(kernels::kHistoryRows, batch))),
                   MemoryUse::kPrefill)),
        num_columns(upload(device, stream,
                           std::vector<std::int32_t>(static_cast<std::size_t>(batch), columns),
                           MemoryUse::kPrefill)) {}

  predictor::AttentionRows of(const DeviceBuffer& block_max, int rows) const {
    return {.block_max = block_max.as<float>(),
            .lse = lse.as<float>(),
            .rows = rows,
            .pitch = pitch,
            .num_columns = num_columns.as<std::int32_t>()};
  }

  int pitch;
  DeviceBuffer prompt, step, lse, num_columns;
};

// The histories of a batch under one policy.
class Histories {
 public:
  Histories(predictor::Policy& policy, kernels::Device& device, kernels::Stream& stream,
            int context, int batch)
      : policy_(policy) {
    std::vector<kernels::HistoryState> histories;
    std::vector<kernels::Selection> selections;
    for (int i = 0; i < batch; ++i) {
      states_.push_back(policy.admit(context, stream));
      histories.push_back(states_.back()->history);
      selections.push_back(states_.back()->selection);
    }
    histories_ = upload(device, stream, histories, MemoryUse::kHistory);
    selections_ = upload(device, stream, selections, MemoryUse::kHistory);
  }

  void append_prompt(const predictor::AttentionRows& rows, kernels::Stream& stream) {
    for (std::size_t i = 0; i < states_.size(); ++i) {
      for (int layer = 0; layer < num_layers(); ++layer) {
        policy_.observe_prefill(batch().histories + i, layer, rows, stream);
      }
    }
  }
  void append_step(const predictor::AttentionRows& rows, kernels::Stream& stream) {
    for (int layer = 0; layer < num_layers(); ++layer) {
      policy_.observe_decode(batch(), layer, rows, stream);
    }
  }
  void select(kernels::Stream& stream) { policy_.select_ahead(batch(), stream); }
  int num_maps() const {
    const kernels::HistoryState& history = states_.front()->history;
    return history.num_layers * history.num_kv_heads * history.maps_per_kv_head;
  }

 private:
  int num_layers() const { return states_.front()->history.num_layers; }
  predictor::DecodeBatch batch() const {
    return {.rows = static_cast<int>(states_.size()),
            .sequences = nullptr,
            .histories = histories_.as<kernels::HistoryState>(),
            .selections = selections_.as<kernels::Selection>()};
  }

  predictor::Policy& policy_;
  std::vector<std::unique_ptr<predictor::PolicyState>> states_;
  DeviceBuffer histories_, selections_;
};

class PredictorBench {
 public:
  explicit PredictorBench(const PredictorBenchOptions& options)
      : options_(options),
        config_(read_model_config(options.service.model).value_or_throw()),
        device_(make_device(options.service, config_, /*gpu=*/0)),
        stream_(device_->make_stream(kernels::StreamKind::kCompute)) {}

  Json run() {
    Json rows = Json::array();
    for (const int context : options_.context) {
      for (const double hot : options_.hot) measure_rows(context, hot, rows);
    }
    return {{"bench", "predictor"},
            {"device", device_->info().name},
            {"batch", options_.batch},
            {"budget_tokens", options_.budget},
            {"rows", rows}};
  }

 private:
  using PredictPer = predictor::PredictPer;
  using HistoryType = kernels::HistoryType;

  void measure_rows(int context, double hot_percent, Json& rows) {
    const int heads = static_cast<int>(config_.num_heads);
    SyntheticRows source(heads, static_cast<int>(config_.num_kv_heads), blocks_for(context),
                         hot_percent / 100);
    const DeviceRows attention(*device_, *stream_, source, heads, blocks_for(context),
                               options_.batch);
    for (const PredictPer per : {PredictPer::kKvHead, PredictPer::kQueryHead}) {
      for (const HistoryType type : {HistoryType::kBf16, HistoryType::kE5m3}) {
        rows.push_back(measure({context, hot_percent, per, type}, attention));
      }
    }
  }

  std::unique_ptr<predictor::Policy> make_policy(const Case& at) {
    predictor::PolicyConfig policy;
    policy.kind = predictor::PolicyKind::kAttentionPredictor;
    policy.budget_tokens = options_.budget;
    policy.predict_per = at.per;
    policy.history_type = at.type;
    predictor::PolicyShape shape;
    shape.kv.num_layers = static_cast<int>(config_.num_layers);
    shape.kv.num_kv_heads = static_cast<int>(config_.num_kv_heads);
    shape.kv.head_dim = static_cast<int>(config_.head_dim);
    shape.num_heads = static_cast<int>(config_.num_heads);
    return predictor::make_policy(policy, shape, *device_).value_or_throw();
  }

  // Rows first, by themselves at the end: sums slide by one row from step to step.
  Json measure(const Case& at, const DeviceRows& attention) {
    const auto policy = make_policy(at);
    Histories histories(*policy, *device_, *stream_, at.context, options_.batch);
    histories.append_prompt(attention.of(attention.prompt, kernels::kHistoryRows), *stream_);
    const predictor::AttentionRows row = attention.of(attention.step, 1);
    const Milliseconds step = time_recorded(*device_, *stream_, kSteps, [&](int) {
      histories.append_step(row, *stream_);
      histories.select(*stream_);
    });
    const Milliseconds append = time_recorded(*device_, *stream_, kSteps,
                                              [&](int) { histories.append_step(row, *stream_); });
    return {{"context_tokens", at.context},
            {"hot_percent", at.hot_percent},
            {"predict_per", at.per == PredictPer::kKvHead ? "kv-head" : "query-head"},
            {"history_type", at.type == HistoryType::kBf16 ? "bf16" : "e5m3"},
            {"maps", histories.num_maps()},
            {"predict_ms", (step - append).count()},
            {"append_ms", append.count()}};
  }

  PredictorBenchOptions options_;
  ModelConfig config_;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> stream_;
};

}  // namespace

std::string bench_predictor(const PredictorBenchOptions& options) {
  return PredictorBench(options).run().dump();
}

}  // namespace foretoken::worker
