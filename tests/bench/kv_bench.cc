// Speed of the KV ops on the CPU device and of the store's requests, at SmolLM2-135M's shape:
//
//   kv_bench [--context 7000] [--budget 1024] [--json]
//
// The store runs in this process; its arena holds two sequences. Times are the best of several
// runs, requests the median. docs/measurements.md keeps the results.
#include <sys/eventfd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "kernels/checksum.h"
#include "kvstore/internal/server.h"
#include "kvstore/kv_store.h"
#include "tests/kernels/kv_sequence.h"

namespace foretoken::kvstore {
namespace {

using kernels::FetchTable;
using kernels::KvSequence;
using kernels::SelectionTable;
using kernels::StreamKind;
using Clock = std::chrono::steady_clock;

const kernels::KvShape kShape{30, 3, 64, kernels::DataType::kFp16};
constexpr int kRuns = 15;

double seconds_of(const std::function<void()>& body) {
  const auto start = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - start).count();
}
double best_seconds(const std::function<void()>& body) {
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) best = std::min(best, seconds_of(body));
  return best;
}

// A store on a thread, in a folder of its own.
class LocalStore {
 public:
  explicit LocalStore(std::size_t arena_bytes)
      : stop_(eventfd(0, EFD_CLOEXEC)), server_({socket(), arena_bytes, NumaPlacement::kSpread}) {
    thread_ = std::thread([this] { server_.run(stop_.get()); });
  }
  ~LocalStore() {
    eventfd_write(stop_.get(), 1);
    thread_.join();
    std::filesystem::remove_all(folder_);
  }
  std::string socket() {
    if (folder_.empty()) {
      std::string pattern = std::filesystem::temp_directory_path() / "kv-bench-XXXXXX";
      folder_ = mkdtemp(pattern.data());
    }
    return folder_ / "store";
  }

 private:
  std::filesystem::path folder_;
  FileDescriptor stop_;
  Server server_;
  std::thread thread_;
};

class Bench {
 public:
  Bench(int context, int budget)
      : context_(context),
        num_slots_(budget / kBlockTokens + 1),
        device_(kernels::make_cpu_device({1, std::size_t{4} << 30})),
        compute_(device_->make_stream(StreamKind::kCompute)),
        copy_(device_->make_stream(StreamKind::kCopy)),
        local_(2 * 3 * kShape.slab_bytes() * static_cast<std::size_t>(segments_for(context) + 1)),
        kv_(kShape, num_slots_, blocks_for(context + 1)) {
    StoreClientConfig config;
    config.socket_path = local_.socket();
    config.model_hash = "bench";
    config.total_kv_heads = 3;
    config.shape = kShape;
    store_ = KvStore::connect(config, *device_).value_or_throw();
    while (store_->stat()->slabs_ready < store_->slabs_per_head()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }

  nlohmann::json run() {
    nlohmann::json figures;
    figures["copy_with_checksum_gb_s"] = checksum();
    figures["memcpy_gb_s"] = plain_copy();
    reservation_ = *store_->reserve(SequenceId{1}, {}, segments_for(context_ + 1));
    kv_.view.slabs = reservation_.slabs.data();
    kv_.view.max_segments = reservation_.num_segments;
    figures["pack_gb_s"] = pack();
    kv_.length = context_;
    decode_step(figures);
    requests(figures);
    return figures;
  }

 private:
  // Over memory far larger than the caches, as a gather's is.
  double over_blocks(const std::function<void(std::byte*, const std::byte*)>& copy_block) {
    const std::size_t block = kShape.block_bytes();
    const std::vector<std::byte> from(std::size_t{128} << 20, std::byte{3});
    std::vector<std::byte> to(std::size_t{1} << 20);
    const double seconds = best_seconds([&] {
      for (std::size_t at = 0; at < from.size(); at += block) {
        copy_block(to.data() + at % to.size(), from.data() + at);
      }
    });
    return static_cast<double>(from.size()) / seconds / 1e9;
  }
  double checksum() {
    std::uint64_t sum = 0;
    const double speed = over_blocks([&](std::byte* to, const std::byte* from) {
      sum += kernels::copy_with_checksum(to, from, kShape.block_bytes(), 0, 0);
    });
    return sum == 1 ? 0 : speed;  // so that the sums are not left out
  }
  double plain_copy() {
    return over_blocks(
        [](std::byte* to, const std::byte* from) { std::memcpy(to, from, kShape.block_bytes()); });
  }

  // Prefill's way to the arena, all layers.
  double pack() {
    const std::size_t scratch_bytes = 3 * static_cast<std::size_t>(context_) * 128;
    const std::vector<std::byte> scratch(scratch_bytes, std::byte{5});
    const double seconds = best_seconds([&] {
      for (int layer = 0; layer < kShape.num_layers; ++layer) {
        store_->pack({scratch.data(), scratch.data(), context_, 3, 64, layer, 0,
                      blocks_for(context_), context_, true, &kv_.view},
                     *compute_);
      }
    });
    return 2.0 * static_cast<double>(scratch_bytes) * kShape.num_layers / seconds / 1e9;
  }

  // Resolve and gather of all layers: with every selected block new, and with none.
  void decode_step(nlohmann::json& figures) {
    const int num_selected = num_slots_ - 9;  // sink and local at their most
    SelectionTable selection(kShape, num_selected);
    FetchTable fetches(kShape, num_slots_);
    std::mt19937 random(1);
    double resolve_new = 1e9;
    double gather_new = 1e9;
    std::int64_t blocks = 0;
    for (int run = 0; run < kRuns; ++run) {
      choose(selection, random);
      resolve_new = std::min(resolve_new, seconds_of([&] { resolve(selection, fetches); }));
      blocks = std::accumulate(fetches.counts.begin(), fetches.counts.end(), std::int64_t{0});
      gather_new = std::min(gather_new, seconds_of([&] { gather(fetches); }));
    }
    figures["resolve_all_new_ms"] = 1e3 * resolve_new;
    figures["resolve_none_new_ms"] = 1e3 * best_seconds([&] { resolve(selection, fetches); });
    figures["gather_all_new_ms"] = 1e3 * gather_new;
    figures["gather_all_new_blocks"] = blocks;
    figures["gather_gb_s"] =
        static_cast<double>(blocks) * static_cast<double>(kShape.block_bytes()) / gather_new / 1e9;
    figures["checksum_failures"] = kv_.mismatches;
  }
  void choose(SelectionTable& selection, std::mt19937& random) const {
    std::ranges::fill(selection.counts, selection.view.max_selected);
    for (auto& block : selection.blocks) {
      block = static_cast<int>(random() % static_cast<unsigned>(context_ / kBlockTokens));
    }
  }
  void resolve(SelectionTable& selection, FetchTable& fetches) {
    device_->resolve({&kv_.view, &selection.view, &fetches.view, 1, 0, kShape.num_layers},
                     *compute_);
  }
  void gather(FetchTable& fetches) {
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      store_->fetch(layer, 1, &kv_.view, &fetches.view, 1, *copy_);
    }
    copy_->synchronize();
  }

  void requests(nlohmann::json& figures) {
    std::vector<double> seconds;
    for (std::uint64_t i = 0; i < 2'000; ++i) {
      const SequenceId sequence{100 + i};
      const int segments = segments_for(context_);
      seconds.push_back(seconds_of([&] { (void)store_->reserve(sequence, {}, segments); }));
      (void)store_->release(sequence).has_value();
    }
    std::ranges::sort(seconds);
    figures["reserve_p50_us"] = 1e6 * seconds[seconds.size() / 2];
    figures["reserve_p99_us"] = 1e6 * seconds[seconds.size() * 99 / 100];
  }

  int context_;
  int num_slots_;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> compute_;
  std::unique_ptr<kernels::Stream> copy_;
  LocalStore local_;
  KvSequence kv_;
  std::unique_ptr<KvStore> store_;
  Reservation reservation_;
};

}  // namespace
}  // namespace foretoken::kvstore

int main(int argc, char** argv) {
  CLI::App app("Speed of the CPU device's KV ops and of the KV store's requests");
  int context = 7000;
  int budget = 1024;
  bool json = false;
  app.add_option("--context", context, "Tokens of the sequence")->check(CLI::Range(512, 1 << 20));
  app.add_option("--budget", budget, "Tokens that stay resident")->check(CLI::Range(256, 1 << 20));
  app.add_flag("--json", json, "One JSON object instead of a table");
  CLI11_PARSE(app, argc, argv);
  try {
    const nlohmann::json figures = foretoken::kvstore::Bench(context, budget).run();
    if (json) {
      std::cout << figures.dump(2) << '\n';
      return 0;
    }
    for (const auto& [name, value] : figures.items()) std::cout << name << ": " << value << '\n';
  } catch (const foretoken::Exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
