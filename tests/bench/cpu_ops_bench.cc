// Speed of the CPU device's transformer ops at SmolLM2-135M's shapes, for one thread and for all:
//
//   cpu_ops_bench [--threads N] [--context 7000] [--json]
//
// Times are the best of several runs; a read of plain memory in the same run is the yardstick of
// what decoding can reach. docs/measurements.md keeps the results.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "kernels/cpu/thread_pool.h"
#include "kernels/device.h"

namespace foretoken::kernels {
namespace {

constexpr int kLayers = 30;
constexpr int kHidden = 576;
constexpr int kIntermediate = 1536;
constexpr int kNumHeads = 9;
constexpr int kNumKvHeads = 3;
constexpr int kHeadDim = 64;
constexpr int kQkvColumns = (kNumHeads + 2 * kNumKvHeads) * kHeadDim;

double best_seconds(int runs, const std::function<void()>& body) {
  double best = 1e9;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

// A whole stack of layers' weights: far larger than any cache, as in decoding.
struct Layers {
  struct Layer {
    std::unique_ptr<Weight> qkv, o, gate_up, down;
  };
  explicit Layers(Device& device) {
    for (int i = 0; i < kLayers; ++i) {
      all.push_back({make(device, kQkvColumns, kHidden), make(device, kHidden, kHidden),
                     make(device, 2 * kIntermediate, kHidden),
                     make(device, kHidden, kIntermediate)});
    }
  }
  std::unique_ptr<Weight> make(Device& device, int rows, int columns) {
    const std::vector<std::uint16_t> zeros(static_cast<std::size_t>(rows) * columns, 0x2000);
    const WeightPart part{reinterpret_cast<const std::byte*>(zeros.data()), DataType::kFp16, rows,
                          columns, static_cast<std::size_t>(columns) * 2};
    num_weights += static_cast<double>(rows) * columns;
    return device.make_weight({&part, 1});
  }
  std::vector<Layer> all;
  double num_weights = 0;
};

class Bench {
 public:
  explicit Bench(int threads)
      : device_(make_cpu_device({threads, std::size_t{4} << 30})),
        stream_(device_->make_stream(StreamKind::kCompute)),
        pool_(threads) {}

  nlohmann::json run(int context) {
    nlohmann::json result;
    result["threads"] = device_->info().compute_units;
    result["read_gb_per_s"] = read_bandwidth();
    const Layers layers(*device_);
    for (const int rows : {1, 2, 4, 8}) {
      result["linear_gb_per_s"][std::to_string(rows)] =
          2 * layers.num_weights / linear_seconds(layers, rows, 5) / 1e9;
    }
    for (const int rows : {16, 64, 512}) {
      result["linear_gflop_per_s"][std::to_string(rows)] =
          2 * rows * layers.num_weights / linear_seconds(layers, rows, 2) / 1e9;
    }
    for (const int tokens : {512, context}) {
      result["prefill_attention_gflop_per_s"][std::to_string(tokens)] = prefill_attention(tokens);
      result["decode_attention_gb_per_s"][std::to_string(tokens)] = decode_attention(tokens);
    }
    return result;
  }

 private:
  double read_bandwidth() {
    constexpr std::size_t kPiece = std::size_t{1} << 17;  // floats: 512 KiB
    constexpr int kPieces = 512;
    constexpr std::size_t kBytes = kPiece * kPieces * sizeof(float);
    const DeviceBuffer memory(*device_, kBytes, MemoryUse::kKvSlots);
    device_->fill_zero(memory.data(), kBytes, *stream_);
    std::vector<float> sums(kPieces);
    const double seconds = best_seconds(5, [&] {
      pool_.parallel_for(kPieces, [&](int piece, int) {
        const float* from = memory.as<float>() + static_cast<std::size_t>(piece) * kPiece;
        float sum[32] = {};
        for (std::size_t i = 0; i < kPiece; i += 32) {
          for (std::size_t j = 0; j < 32; ++j) sum[j] += from[i + j];
        }
        sums[static_cast<std::size_t>(piece)] = sum[0] + sum[31];
      });
    });
    return static_cast<double>(kBytes) / seconds / 1e9;
  }

  double linear_seconds(const Layers& layers, int rows, int runs) {
    const std::vector<float> x(static_cast<std::size_t>(rows) * kIntermediate, 0.5F);
    std::vector<float> out(static_cast<std::size_t>(rows) * 2 * kIntermediate);
    return best_seconds(runs, [&] {
      for (const auto& layer : layers.all) {
        for (const Weight* weight :
             {layer.qkv.get(), layer.o.get(), layer.gate_up.get(), layer.down.get()}) {
          device_->linear({x.data(), weight, nullptr, rows, out.data()}, *stream_);
        }
      }
    });
  }

  double prefill_attention(int tokens) {
    const auto count = static_cast<std::size_t>(tokens);
    const std::vector<float> q(count * kNumHeads * kHeadDim, 0.1F);
    std::vector<float> out(q.size());
    std::vector<std::uint16_t> kv(count * kNumKvHeads * kHeadDim, 0x2000);
    const PrefillAttentionArgs args{q.data(), kv.data(), kv.data(),  DataType::kFp16, tokens,
                                    0,        tokens,    tokens,     kNumHeads,       kNumKvHeads,
                                    kHeadDim, 0.125F,    out.data(), nullptr};
    const double seconds = best_seconds(3, [&] { device_->prefill_attention(args, *stream_); });
    return 2.0 * tokens * tokens * kNumHeads * kHeadDim / seconds / 1e9;  // half of the square
  }

  double decode_attention(int tokens) {
    const KvShape shape{kLayers, kNumKvHeads, kHeadDim, DataType::kFp16};
    const int blocks = tokens / kBlockTokens + 1;
    const DeviceBuffer slots(
        *device_, shape.block_bytes() * static_cast<std::size_t>(blocks) * kLayers * kNumKvHeads,
        MemoryUse::kKvSlots);
    std::fill_n(slots.as<std::uint16_t>(), slots.bytes() / 2, std::uint16_t{0x2000});
    std::vector<std::int32_t> table(static_cast<std::size_t>(blocks) * kLayers * kNumKvHeads);
    for (std::size_t i = 0; i < table.size(); ++i) {
      table[i] = static_cast<std::int32_t>(i % static_cast<std::size_t>(blocks));
    }
    std::int32_t length = tokens;
    SequenceKv kv{};
    kv.slots = slots.as<std::byte>();
    kv.block_to_slot = table.data();
    kv.slot_to_block = table.data();
    kv.length = &length;
    kv.num_slots = blocks;
    kv.max_blocks = blocks;
    kv.shape = shape;
    const std::vector<float> q(kNumHeads * kHeadDim, 0.1F);
    std::vector<float> out(q.size());
    std::vector<float> lse(kNumHeads);
    std::vector<float> block_max(static_cast<std::size_t>(blocks) * kLayers * kNumHeads);
    kv.block_max = block_max.data();
    const double seconds = best_seconds(10, [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        device_->decode_attention({q.data(), &kv, 1, layer, kNumHeads, kNumKvHeads, kHeadDim,
                                   0.125F, out.data(), lse.data()},
                                  *stream_);
      }
    });
    return static_cast<double>(slots.bytes()) / seconds / 1e9;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  ThreadPool pool_;
};

}  // namespace
}  // namespace foretoken::kernels

int main(int argc, char** argv) {
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  int context = 7000;
  bool json = false;
  CLI::App app("Speed of the CPU device's transformer ops");
  app.add_option("--threads", threads, "the larger number of threads; one is always measured");
  app.add_option("--context", context, "tokens of the long case");
  app.add_flag("--json", json, "one line, for programs");
  CLI11_PARSE(app, argc, argv);
  nlohmann::json results = nlohmann::json::array();
  for (const int n : threads == 1 ? std::vector{1} : std::vector{1, threads}) {
    results.push_back(foretoken::kernels::Bench(n).run(context));
  }
  std::cout << results.dump(json ? -1 : 2) << "\n";
}
