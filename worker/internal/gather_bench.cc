#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "common/check.h"
#include "common/ids.h"
#include "kernels/op_timing.h"
#include "worker/bench.h"
#include "worker/internal/bench_sequence.h"
#include "worker/internal/fetch_groups.h"
#include "worker/internal/make_device.h"
#include "worker/model.h"

namespace foretoken::worker {
namespace {

using Json = nlohmann::ordered_json;
using kernels::DeviceBuffer;
using kernels::MemoryUse;
using kernels::Milliseconds;

constexpr std::size_t kMuchBytes = std::size_t{256} << 20;  // more than any cache holds
constexpr int kMostLists = 64;
constexpr int kDenseSteps = 4;  // in one graph

std::unique_ptr<Model> load_random(const ModelConfig& config, kernels::Device& device,
                                   Collective& collective) {
  LoadProgress progress(LoadProgress::Style::kNone);
  return Model::load(config, *make_dummy_source(config),
                     make_partition(config, 0, 1).value_or_throw(), device, collective, progress)
      .value_or_throw();
}

// The products of a decode step: all weights of a model, random ones, by one row.
class DenseStep {
 public:
  DenseStep(const ModelConfig& config, kernels::Device& device, kernels::Stream& stream)
      : collective_(make_single_collective()),
        model_(load_random(config, device, *collective_)),
        act_(device, config, model_->partition(), 1, 1),
        hidden_(device, model_->hidden_bytes(1), MemoryUse::kActivations),
        logits_(device, sizeof(float) * static_cast<std::size_t>(config.vocab_size),
                MemoryUse::kActivations),
        token_(device, sizeof(TokenId), MemoryUse::kActivations) {
    device.fill_zero(token_.data(), token_.bytes(), stream);
    model_->embed(token_.as<TokenId>(), 1, hidden_.data(), stream);
    // Numbers, and not zeros: a product of zeros draws less power.
    device.copy(act_.attn.data(), hidden_.data(), std::min(act_.attn.bytes(), hidden_.bytes()),
                stream);
  }

  void run(kernels::Stream& stream) {
    model_->embed(token_.as<TokenId>(), 1, hidden_.data(), stream);
    model_->project_qkv(0, 1, act_, hidden_.data(), stream);
    for (int layer = 0; layer < model_->num_layers(); ++layer) {
      model_->finish_layer_and_next(layer, 1, act_, hidden_.data(), logits_.as<float>(), stream);
    }
  }
  const kernels::KvShape& kv_shape() const { return model_->kv_shape(); }

 private:
  std::unique_ptr<Collective> collective_;
  std::unique_ptr<Model> model_;
  Activations act_;
  DeviceBuffer hidden_, logits_, token_;
};

class GatherBench {
 public:
  explicit GatherBench(const GatherBenchOptions& options)
      : options_(options),
        config_(read_model_config(options.service.model).value_or_throw()),
        device_(make_device(options.service, config_, /*gpu=*/0)),
        compute_(device_->make_stream(kernels::StreamKind::kCompute)),
        copy_(device_->make_stream(kernels::StreamKind::kCopy)),
        forked_(device_->make_event()),
        joined_(device_->make_event()),
        dense_(config_, *device_, *compute_) {
    dense_.run(*compute_);
    compute_->synchronize();
    dense_graph_ = device_->record(*compute_, [this] {
      for (int i = 0; i < kDenseSteps; ++i) dense_.run(*compute_);
    });
  }

  Json run() {
    Json rows = Json::array();
    double link = 0;
    for (const std::size_t block_bytes : block_sizes()) {
      const BenchSequence sequence(*device_, *compute_, shape_of(block_bytes),
                                   num_blocks(block_bytes), num_slots());
      link = std::max(link, link_gb_per_s(sequence.arena()));
      for (const double churn : options_.churn) rows.push_back(measure(sequence, churn));
      check_blocks(sequence);
    }
    for (Json& row : rows) row["link_share"] = row["gb_per_s"].get<double>() / link;
    return {{"bench", "gather"},
            {"device", device_->info().name},
            {"gather_units", device_->info().gather_units},
            {"link_gb_per_s", link},
            {"context_tokens", options_.context},
            {"budget_tokens", options_.budget},
            {"rows", rows}};
  }

 private:
  using Lists = std::vector<std::unique_ptr<StepFetches>>;

  std::vector<std::size_t> block_sizes() const {
    std::vector<std::size_t> sizes;
    for (const int kib : options_.block_kib) sizes.push_back(static_cast<std::size_t>(kib) << 10);
    if (sizes.empty()) sizes.push_back(dense_.kv_shape().block_bytes());
    return sizes;
  }
  // Only the size of a head's vectors tells one block size from another.
  kernels::KvShape shape_of(std::size_t block_bytes) const {
    kernels::KvShape shape = dense_.kv_shape();
    shape.head_dim = static_cast<int>(block_bytes / (2 * kBlockTokens * shape.element_bytes()));
    return shape;
  }
  // As many bytes for every block size; whole segments.
  int num_blocks(std::size_t block_bytes) const {
    const std::size_t bytes =
        static_cast<std::size_t>(blocks_for(options_.context)) * dense_.kv_shape().block_bytes();
    const auto segments = static_cast<int>(bytes / block_bytes) / kSegmentBlocks;
    return std::max(1, segments) * kSegmentBlocks;
  }
  // One for each critical block.
  int num_slots() const {
    return std::max(1, (options_.budget - kSinkTokens - kLocalTokens) / kBlockTokens);
  }

  double link_gb_per_s(const RegisteredMemory& arena) {
    const std::size_t bytes = std::min(kMuchBytes, arena.bytes());
    const DeviceBuffer to(*device_, bytes, MemoryUse::kActivations);
    const Milliseconds took = time_recorded(*device_, *copy_, 2, [&](int) {
      device_->copy_in(to.data(), arena.host(), bytes, *copy_);
    });
    return static_cast<double>(bytes) / took.count() * 1e-6;
  }

  // A step's, as the service's.
  void gather(const BenchSequence& sequence, const StepFetches& fetches) {
    const int num_layers = sequence.kv().shape.num_layers;
    for (int layer = 0, count = 0; layer < num_layers; layer += count) {
      count = layers_to_fetch(*device_, layer, num_layers);
      device_->gather({.sequences = sequence.on_device(),
                       .fetches = fetches.on_device(),
                       .rows = 1,
                       .layer = layer,
                       .num_layers = count},
                      *copy_);
    }
  }

  // As many steps' lists as make much more than a cache holds, so that each step finds its blocks
  // in host memory.
  Lists make_lists(const BenchSequence& sequence, double churn) {
    std::mt19937 random(1);
    Lists lists;
    std::size_t bytes = 0;
    while (lists.empty() || (bytes < kMuchBytes && lists.size() < kMostLists)) {
      lists.push_back(
          std::make_unique<StepFetches>(*device_, *compute_, sequence.kv(), churn / 100, random));
      bytes +=
          static_cast<std::size_t>(lists.back()->num_blocks()) * sequence.kv().shape.block_bytes();
    }
    return lists;
  }

  Json measure(const BenchSequence& sequence, double churn) {
    const Lists lists = make_lists(sequence, churn);
    gather(sequence, *lists.front());
    copy_->synchronize();
    const auto gathers = device_->record(*copy_, [&] {
      for (const auto& list : lists) gather(sequence, *list);
    });
    std::int64_t blocks = 0;
    for (const auto& list : lists) blocks += list->num_blocks();
    const Milliseconds all = time_launch(*gathers, *copy_);
    const double bytes =
        static_cast<double>(blocks) * static_cast<double>(sequence.kv().shape.block_bytes());
    const auto steps = static_cast<double>(lists.size());
    const Milliseconds dense = time_launch(*dense_graph_, *compute_) / kDenseSteps;
    const Milliseconds beside = dense_beside(*gathers, dense / all);
    return {{"block_bytes", sequence.kv().shape.block_bytes()},
            {"churn_percent", churn},
            {"blocks", static_cast<double>(blocks) / steps},
            {"ms", all.count() / steps},
            {"gb_per_s", bytes / all.count() * 1e-6},
            {"link_share", 0.0},
            {"dense_ms", dense.count()},
            {"dense_beside_ms", beside.count()},
            {"dense_slow_down", beside / dense - 1},
            {"step_ms", whole_step(sequence, lists).count()}};
  }

  // The products while gathers run without a pause. Again where the gathers ended first.
  // share: of the products' time to that of all gathers.
  Milliseconds dense_beside(kernels::Graph& gathers, double share) {
    constexpr int kLeast = 3;
    int launches = 2 + static_cast<int>(std::ceil(2 * kDenseSteps * share));
    Milliseconds best = Milliseconds::max();
    for (int valid = 0; valid < kLeast;) {
      for (int i = 0; i < launches; ++i) gathers.launch(*copy_);
      joined_->record(*copy_);
      const Milliseconds took = time_once(*compute_, [&] { dense_graph_->launch(*compute_); });
      const bool covered = !joined_->done();
      copy_->synchronize();
      if (covered) {
        best = std::min(best, took / kDenseSteps);
        ++valid;
      } else {
        launches *= 2;
      }
    }
    return best;
  }

  // One step's gather forked off at the head of that step's products, and joined at its end.
  Milliseconds whole_step(const BenchSequence& sequence, const Lists& lists) {
    const int repeats = std::min(kDenseSteps, static_cast<int>(lists.size()));
    return time_recorded(*device_, *compute_, repeats, [&](int i) {
      forked_->record(*compute_);
      forked_->wait(*copy_);
      gather(sequence, *lists[static_cast<std::size_t>(i)]);
      joined_->record(*copy_);
      dense_.run(*compute_);
      joined_->wait(*compute_);
    });
  }

  void check_blocks(const BenchSequence& sequence) {
    std::uint32_t wrong = 0;
    device_->copy_out(&wrong, sequence.kv().mismatches, sizeof wrong, *compute_);
    compute_->synchronize();
    if (wrong == 0) return;
    throw Exception(ErrorCode::kDevice,
                    std::to_string(wrong) + " blocks did not arrive as they were written");
  }

  GatherBenchOptions options_;
  ModelConfig config_;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> compute_, copy_;
  std::unique_ptr<kernels::Event> forked_, joined_;
  DenseStep dense_;
  std::unique_ptr<kernels::Graph> dense_graph_;
};

}  // namespace

std::string bench_gather(const GatherBenchOptions& options) {
  return GatherBench(options).run().dump();
}

}  // namespace foretoken::worker
