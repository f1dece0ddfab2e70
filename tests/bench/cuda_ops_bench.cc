// What the ops of a decode step and of prefill cost on a GPU, in the shape of Llama-3.1-8B, beside
// what plain kernels that copy and read memory reach. Prints one JSON object.
//
//   cuda_ops_bench [sampling]     sampling: that op alone
#include <algorithm>
#include <bit>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/device.h"
#include "kernels/op_timing.h"
#include "tests/bench/memory_kernels.h"

namespace foretoken::kernels {
namespace {

constexpr int kHidden = 4096;
constexpr int kIntermediate = 14336;
constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kHeadDim = 128;
constexpr int kVocab = 128256;

class Bench {
 public:
  Bench() : device_(make_cuda_device({})), stream_(device_->make_stream(StreamKind::kCompute)) {}

  // Microseconds of one of `repeats` runs of `ops`.
  double time(int repeats, const std::function<void(int)>& ops) {
    return 1000 * time_recorded(*device_, *stream_, repeats, ops).count();
  }

  Device& device() { return *device_; }
  Stream& stream() { return *stream_; }
  // Zeros, or bf16 values of a normal distribution: a product of zeros draws less power than one of
  // real values, and so runs at a higher clock.
  DeviceBuffer buffer(std::size_t bytes) {
    DeviceBuffer made(*device_, bytes, MemoryUse::kActivations);
    device_->fill_zero(made.data(), bytes, *stream_);
    return made;
  }
  DeviceBuffer random_buffer(std::size_t bytes) {
    DeviceBuffer made(*device_, bytes, MemoryUse::kActivations);
    const auto& values = random_values();
    auto* to = made.as<std::byte>();
    for (std::size_t at = 0; at < bytes; at += 2 * values.size()) {
      device_->copy_in(to + at, values.data(), std::min(bytes - at, 2 * values.size()), *stream_);
    }
    stream_->synchronize();
    return made;
  }
  static const std::vector<std::uint16_t>& random_values() {
    static const std::vector<std::uint16_t> values = [] {
      std::mt19937 random(1);
      std::normal_distribution<float> normal(0, 0.05F);
      std::vector<std::uint16_t> made(1'048'583);
      for (auto& value : made) {
        value = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(normal(random)) >> 16);
      }
      return made;
    }();
    return values;
  }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

void report(const std::string& what, double us, double bytes, double flops = 0) {
  std::printf("  {\"op\": \"%s\", \"us\": %.2f, \"tb_per_s\": %.3f, \"tflops\": %.1f},\n",
              what.c_str(), us, bytes / us / 1e6, flops / us / 1e6);
  std::fflush(stdout);
}

std::unique_ptr<Weight> weight(Bench& bench, int rows, int columns) {
  const auto& period = Bench::random_values();
  std::vector<std::uint16_t> values(static_cast<std::size_t>(rows) * columns);
  for (std::size_t at = 0; at < values.size(); at += period.size()) {
    const auto count = static_cast<std::ptrdiff_t>(std::min(period.size(), values.size() - at));
    std::copy_n(period.begin(), count, values.begin() + static_cast<std::ptrdiff_t>(at));
  }
  const WeightPart part{reinterpret_cast<const std::byte*>(values.data()), DataType::kBf16, rows,
                        columns, static_cast<std::size_t>(columns) * 2};
  auto weight = bench.device().make_weight({&part, 1});
  bench.device().finish_uploads();
  return weight;
}

// TB/s of plain kernels, over far more than the cache holds: bytes read and written, and bytes
// read.
struct Roofline {
  double copy = 0;
  double read = 0;
};
Roofline roofline(Bench& bench) {
  const std::size_t bytes = std::size_t{2} << 30;
  const DeviceBuffer from = bench.buffer(bytes);
  const DeviceBuffer to = bench.buffer(bytes);
  const double copy_us =
      bench.time(4, [&](int) { copy_memory(to.data(), from.data(), bytes, bench.stream()); });
  const double read_us = bench.time(
      4, [&](int) { read_memory(from.data(), bytes, to.as<unsigned>(), bench.stream()); });
  return {2e-6 * static_cast<double>(bytes) / copy_us, 1e-6 * static_cast<double>(bytes) / read_us};
}

// The four products of a layer; enough copies of the weights that they don't stay in the cache.
void products(Bench& bench, int rows) {
  struct Shape {
    const char* name;
    int out, in;
    bool norm, residual, swiglu;
  };
  const Shape shapes[] = {{"qkv", 6144, kHidden, true, false, false},
                          {"o", kHidden, kHidden, false, true, false},
                          {"gate_up", 2 * kIntermediate, kHidden, true, false, true},
                          {"down", kHidden, kIntermediate, false, true, false},
                          {"lm_head", kVocab, kHidden, true, false, false}};
  const DeviceBuffer x = bench.random_buffer(std::size_t{2} * rows * kIntermediate);
  const DeviceBuffer out = bench.buffer(std::size_t{4} * rows * kVocab);
  const DeviceBuffer scratch = bench.buffer(std::size_t{4} * rows * kIntermediate);
  const DeviceBuffer norm = bench.buffer(std::size_t{4} * kHidden);
  for (const Shape& shape : shapes) {
    const double bytes = 2.0 * shape.out * shape.in;
    const int copies = std::max(1, static_cast<int>(4e8 / bytes));
    std::vector<std::unique_ptr<Weight>> weights;
    for (int i = 0; i < copies; ++i) weights.push_back(weight(bench, shape.out, shape.in));
    const double us = bench.time(2 * copies, [&](int i) {
      LinearArgs args{.x = x.data(),
                      .weight = weights[static_cast<std::size_t>(i % copies)].get(),
                      .bias = nullptr,
                      .rows = rows,
                      .out = out.data(),
                      .out_fp32 = shape.out == kVocab};
      if (shape.norm) args.norm = {norm.as<float>(), 1e-5F, scratch.data()};
      if (shape.residual) args.residual = out.data();
      if (shape.swiglu) args.swiglu = {scratch.data()};
      bench.device().linear(args, bench.stream());
    });
    report("linear " + std::string(shape.name) + " rows " + std::to_string(rows), us, bytes,
           bytes * rows);
  }
}

void decode_attention(Bench& bench, int rows, int context) {
  const KvShape shape{
      .num_layers = 1, .num_kv_heads = kKvHeads, .head_dim = kHeadDim, .kv_type = DataType::kBf16};
  const int blocks = context / kBlockTokens;
  std::vector<std::int32_t> identity(static_cast<std::size_t>(blocks) * kKvHeads);
  for (std::size_t i = 0; i < identity.size(); ++i) {
    identity[i] = static_cast<std::int32_t>(i % static_cast<std::size_t>(blocks));
  }
  const std::int32_t length = context - 1;
  const double bytes = static_cast<double>(shape.block_bytes()) * kKvHeads * blocks * rows;
  const int copies = std::max(1, static_cast<int>(3e8 / bytes));  // more than the cache holds
  std::vector<DeviceBuffer> memory;
  std::vector<SequenceKv> sequences;
  DeviceBuffer table = bench.buffer(identity.size() * 4);
  DeviceBuffer lengths = bench.buffer(4);
  bench.device().copy_in(table.data(), identity.data(), identity.size() * 4, bench.stream());
  bench.device().copy_in(lengths.data(), &length, 4, bench.stream());
  for (int i = 0; i < copies * rows; ++i) {
    memory.push_back(
        bench.buffer(shape.block_bytes() * kKvHeads * static_cast<std::size_t>(blocks)));
    SequenceKv kv{};
    kv.slots = memory.back().as<std::byte>();
    kv.slot_to_block = kv.block_to_slot = table.as<std::int32_t>();
    kv.length = lengths.as<std::int32_t>();
    kv.num_slots = kv.max_blocks = blocks;
    kv.shape = shape;
    sequences.push_back(kv);
  }
  DeviceBuffer batch = bench.buffer(sequences.size() * sizeof(SequenceKv));
  bench.device().copy_in(batch.data(), sequences.data(), batch.bytes(), bench.stream());
  bench.stream().synchronize();
  const std::size_t values = static_cast<std::size_t>(rows) * kHeads * kHeadDim;
  const DeviceBuffer q = bench.buffer(values * 2);
  const DeviceBuffer out = bench.buffer(values * 2);
  const DeviceBuffer lse = bench.buffer(values);
  const double us = bench.time(2 * copies, [&](int i) {
    bench.device().decode_attention({.q = q.data(),
                                     .sequences = batch.as<SequenceKv>() + i % copies * rows,
                                     .rows = rows,
                                     .layer = 0,
                                     .num_heads = kHeads,
                                     .num_kv_heads = kKvHeads,
                                     .head_dim = kHeadDim,
                                     .scale = 0.088F,
                                     .out = out.data(),
                                     .lse = lse.as<float>()},
                                    bench.stream());
  });
  report("decode attention rows " + std::to_string(rows) + " context " + std::to_string(context),
         us, bytes);
}

void prefill_attention(Bench& bench, int rows, int context) {
  const std::size_t q_values = static_cast<std::size_t>(rows) * kHeads * kHeadDim;
  const std::size_t kv_values = static_cast<std::size_t>(context) * kKvHeads * kHeadDim;
  const DeviceBuffer q = bench.random_buffer(q_values * 2);
  const DeviceBuffer out = bench.buffer(q_values * 2);
  const DeviceBuffer k = bench.random_buffer(kv_values * 2);
  const DeviceBuffer v = bench.random_buffer(kv_values * 2);
  const DeviceBuffer lse = bench.buffer(static_cast<std::size_t>(rows) * kHeads * 4);
  const double before = context - rows;
  const double pairs = rows * (before + (rows + 1) / 2.0);
  const double us = bench.time(4, [&](int) {
    bench.device().prefill_attention({.q = q.data(),
                                      .k = k.data(),
                                      .v = v.data(),
                                      .kv_type = DataType::kBf16,
                                      .scratch_tokens = context,
                                      .begin = context - rows,
                                      .rows = rows,
                                      .max_rows = rows,
                                      .num_heads = kHeads,
                                      .num_kv_heads = kKvHeads,
                                      .head_dim = kHeadDim,
                                      .scale = 0.088F,
                                      .out = out.data(),
                                      .lse = lse.as<float>()},
                                     bench.stream());
  });
  report("prefill attention rows " + std::to_string(rows) + " context " + std::to_string(context),
         us, 0, 4.0 * pairs * kHeads * kHeadDim);
}

// Logits of a language model's spread.
DeviceBuffer random_logits(Bench& bench, int rows) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> row(kVocab);
  DeviceBuffer logits = bench.buffer(std::size_t{4} * rows * kVocab);
  for (int i = 0; i < rows; ++i) {
    for (float& logit : row) logit = normal(random);
    bench.device().copy_in(logits.as<float>() + static_cast<std::ptrdiff_t>(i) * kVocab, row.data(),
                           4 * row.size(), bench.stream());
    bench.stream().synchronize();
  }
  return logits;
}

void sampling(Bench& bench, int rows) {
  struct Kind {
    const char* name;
    SampleRow row;
  };
  const Kind kinds[] = {{"greedy", {.seed = 1, .position = 1}},
                        {"temperature", {.temperature = 0.8F, .seed = 1, .position = 1}},
                        {"top-p", {.temperature = 0.8F, .top_p = 0.95F, .seed = 1, .position = 1}}};
  const DeviceBuffer logits = random_logits(bench, rows);
  const DeviceBuffer counts = bench.buffer(logits.bytes());
  for (const Kind& kind : kinds) {
    std::vector<SampleRow> asked(static_cast<std::size_t>(rows), kind.row);
    const DeviceBuffer table = bench.buffer(asked.size() * sizeof(SampleRow));
    const DeviceBuffer out = bench.buffer(asked.size() * sizeof(SampledToken));
    for (std::size_t i = 0; i < asked.size(); ++i) asked[i].out = out.as<SampledToken>() + i;
    bench.device().copy_in(table.data(), asked.data(), table.bytes(), bench.stream());
    bench.stream().synchronize();
    const double us = bench.time(64, [&](int) {
      bench.device().sample({.logits = logits.as<float>(),
                             .rows = table.as<SampleRow>(),
                             .num_rows = rows,
                             .vocab = kVocab,
                             .token_counts = counts.as<std::uint32_t>()},
                            bench.stream());
    });
    report(std::string("sample ") + kind.name + " rows " + std::to_string(rows), us,
           4.0 * rows * kVocab);
  }
}

void products_and_attention(Bench& bench) {
  for (const int rows : {1, 2, 3, 8, 32, 64}) products(bench, rows);
  for (const int rows : {1024, 8192}) products(bench, rows);
  for (const int context : {1024, 8192, 32768, 131072}) decode_attention(bench, 1, context);
  for (const int rows : {8, 32}) decode_attention(bench, rows, 2048);
  prefill_attention(bench, 8192, 8192);
  prefill_attention(bench, 8192, 32768);
  prefill_attention(bench, 2048, 131072);
}

void run(bool only_sampling) {
  Bench bench;
  std::printf("{\"device\": \"%s\", \"ops\": [\n", bench.device().info().name.c_str());
  const Roofline before = roofline(bench);
  if (!only_sampling) products_and_attention(bench);
  for (const int rows : {1, 8, 64}) sampling(bench, rows);
  const Roofline after = roofline(bench);
  std::printf("  {}], \"copy_tb_per_s\": %.3f, \"read_tb_per_s\": %.3f}\n",
              std::max(before.copy, after.copy), std::max(before.read, after.read));
}

}  // namespace
}  // namespace foretoken::kernels

int main(int argc, char** argv) {
  foretoken::kernels::run(argc == 2 && std::string_view(argv[1]) == "sampling");
}
