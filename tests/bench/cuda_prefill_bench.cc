// Time of a layer's prefill attention and of its block maxima on the GPU:
//
//   cuda_prefill_bench --begin 122880 --rows 8192 --heads 32 --kv-heads 8 --head-dim 128
//
// Also the time of the first call, which makes the plan. --max-rows and --max-tokens are the memory
// that there is; by default, no more than the chunk needs. Where --begin is a multiple of the
// chunk's --rows, and these are --max-rows, the plan is exact; else it is padded.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "common/result.h"
#include "kernels/device.h"
#include "kernels/op_timing.h"

namespace {

using namespace foretoken;
using namespace foretoken::kernels;

struct Options {
  int begin = 122880;
  int rows = 8192;
  int heads = 32;
  int kv_heads = 8;
  int head_dim = 128;
  int runs = 10;
  int max_rows = 0;
  int max_tokens = 0;

  int tokens() const { return begin + rows; }
  int room_rows() const { return std::max(rows, max_rows); }
  int room_tokens() const { return std::max(tokens(), max_tokens); }
  // Two products of each query with each key that it sees.
  double flops() const {
    const double keys = begin + 0.5 * rows;
    return 4.0 * heads * head_dim * rows * keys;
  }
};

class Bench {
 public:
  explicit Bench(const Options& o)
      : o_(o),
        device_(make_cuda_device({})),
        stream_(device_->make_stream(StreamKind::kCompute)),
        q_(random_values(static_cast<std::size_t>(o.room_rows()) * o.heads)),
        k_(random_values(static_cast<std::size_t>(o.room_tokens()) * o.kv_heads)),
        v_(random_values(static_cast<std::size_t>(o.room_tokens()) * o.kv_heads)),
        out_(*device_, q_.bytes(), MemoryUse::kPrefill),
        block_max_(*device_, static_cast<std::size_t>(o.heads) * kHistoryRows * pitch() * 4,
                   MemoryUse::kPrefill) {}

  void run() {
    const double first = ms([&] { attend(); });
    double attention = 1e9;
    double block_max = 1e9;
    for (int i = 0; i < o_.runs; ++i) {
      attention = std::min(attention, ms([&] { attend(); }));
      block_max = std::min(block_max, ms([&] { find_block_max(); }));
    }
    std::printf(
        "%s, %d rows against %d tokens: attention %.3f ms, %.0f TFLOP/s (first %.1f ms); "
        "block maxima of %d rows %.3f ms\n",
        device_->info().name.c_str(), o_.rows, o_.tokens(), attention,
        o_.flops() / attention * 1e-9, first, last_rows(), block_max);
  }

 private:
  std::size_t pitch() const { return static_cast<std::size_t>(blocks_for(o_.tokens())); }
  int last_rows() const { return std::min(o_.rows, kHistoryRows); }
  float scale() const { return 1 / std::sqrt(static_cast<float>(o_.head_dim)); }

  // bf16 values about 1: random signs and mantissas.
  DeviceBuffer random_values(std::size_t vectors) {
    std::mt19937 random(1);
    std::vector<std::uint16_t> values(vectors * static_cast<std::size_t>(o_.head_dim));
    for (auto& value : values) value = static_cast<std::uint16_t>(0x3F00U | (random() & 0x80FFU));
    DeviceBuffer buffer(*device_, values.size() * 2, MemoryUse::kPrefill);
    device_->copy_in(buffer.data(), values.data(), values.size() * 2, *stream_);
    stream_->synchronize();
    return buffer;
  }
  void attend() {
    device_->prefill_attention(
        {q_.data(), k_.data(), v_.data(), DataType::kBf16, o_.room_tokens(), o_.begin, o_.rows,
         o_.room_rows(), o_.heads, o_.kv_heads, o_.head_dim, scale(), out_.data(), nullptr},
        *stream_);
  }
  void find_block_max() {
    device_->prefill_block_max(
        {q_.data(), k_.data(), DataType::kBf16, o_.room_tokens(), o_.tokens() - last_rows(),
         last_rows(), o_.heads, o_.kv_heads, o_.head_dim, scale(), block_max_.as<float>(),
         static_cast<int>(pitch())},
        *stream_);
  }
  double ms(const std::function<void()>& ops) { return time_once(*stream_, ops).count(); }

  Options o_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  DeviceBuffer q_;
  DeviceBuffer k_;
  DeviceBuffer v_;
  DeviceBuffer out_;
  DeviceBuffer block_max_;
};

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("Time of a layer's prefill attention and block maxima on the GPU");
  app.add_option("--begin", o.begin, "tokens before the chunk")->check(CLI::NonNegativeNumber);
  app.add_option("--rows", o.rows, "tokens of the chunk")->check(CLI::PositiveNumber);
  app.add_option("--max-rows", o.max_rows, "rows that there is room for")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--max-tokens", o.max_tokens, "tokens that there is room for")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--heads", o.heads)->check(CLI::PositiveNumber);
  app.add_option("--kv-heads", o.kv_heads)->check(CLI::PositiveNumber);
  app.add_option("--head-dim", o.head_dim)->check(CLI::PositiveNumber);
  app.add_option("--runs", o.runs)->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    Bench(o).run();
  } catch (const Exception& e) {
    std::fprintf(stderr, "cuda_prefill_bench: %s\n", e.what());
    return exit_code(e.error().code);
  }
}
