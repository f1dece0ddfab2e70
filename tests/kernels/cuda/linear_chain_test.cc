// linear_chain on several ranks, which share one GPU here, against the same products one by one and
// plain sums, bit for bit.
#include <cmath>
#include <cstdlib>

#include "kernels/peer_sum.h"
#include "tests/kernels/cuda/cuda_test.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

// Ranks that wait for each other on one GPU must not share one of its queues. Read when CUDA
// starts.
const bool kManyQueues = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0) == 0;

// Of the products of a layer: o, gate and up, down, and q, k and v or the logits.
struct Shape {
  int attn;
  int hidden;
  int mlp;
  int next;
  DataType type = DataType::kBf16;
  bool ends_in_logits = false;
  int rows = 1;
};

// A rank's layer on the GPU. Its weights differ from rank to rank.
class Layer {
 public:
  Layer(DeviceUnderTest& on, const Shape& s, int rank)
      : on_(on),
        s_(s),
        rank_(rank),
        attn_(values(s.rows * s.attn)),
        mlp_(values(s.rows * s.mlp)),
        scratch_(values(s.rows * 2 * std::max(s.mlp, s.hidden))),
        next_(on, std::vector<float>(static_cast<std::size_t>(s.rows * s.next))),
        norm_(on, random_floats(static_cast<std::size_t>(s.hidden), 7)),
        bias_(on, random_floats(static_cast<std::size_t>(2 * s.mlp + s.hidden), 8)),
        o_(weight(s.hidden, s.attn)),
        gate_up_(weight(2 * s.mlp, s.hidden)),
        down_(weight(s.hidden, s.mlp)),
        next_weight_(weight(s.next, s.hidden)),
        hidden_(values(s.rows * s.hidden)) {}

  Device& device() { return *on_.device; }
  std::byte* hidden() { return hidden_.data(); }
  // Every rank has the same.
  void set_hidden(int seed) {
    const auto all = random_floats(static_cast<std::size_t>(s_.rows * s_.hidden), 100U + seed);
    hidden_.set(reference::encode(all, s_.type));
  }
  // What is not written from now on is no number.
  void forget_results() {
    mlp_.set(
        std::vector<std::byte>(2 * static_cast<std::size_t>(s_.rows * s_.mlp), std::byte{0xFF}));
    next_.set(std::vector<float>(static_cast<std::size_t>(s_.rows * s_.next), NAN));
  }
  std::vector<float> hidden_values() const { return floats_of(hidden_, s_.type); }
  std::vector<float> next_values() const {
    return s_.ends_in_logits ? next_.get() : floats_of_next();
  }

  LinearArgs o(void* out) {
    return {.x = attn_.data(),
            .weight = o_.get(),
            .bias = bias_.data(),
            .rows = s_.rows,
            .out = out,
            .residual = rank_ == 0 ? hidden() : nullptr};
  }
  LinearArgs gate_up() {
    return {.x = hidden(),
            .weight = gate_up_.get(),
            .bias = bias_.data(),
            .rows = s_.rows,
            .out = mlp_.data(),
            .norm = {norm_.data(), 1e-5F, scratch_.data()},
            .swiglu = {scratch_.data()}};
  }
  LinearArgs down(void* out) {
    return {.x = mlp_.data(),
            .weight = down_.get(),
            .bias = nullptr,
            .rows = s_.rows,
            .out = out,
            .residual = rank_ == 0 ? hidden() : nullptr};
  }
  LinearArgs next() {
    return {.x = hidden(),
            .weight = next_weight_.get(),
            .bias = nullptr,
            .rows = s_.rows,
            .out = next_.data(),
            .out_fp32 = s_.ends_in_logits,
            .norm = {norm_.data(), 1e-5F, scratch_.data()}};
  }
  std::array<LinearArgs, 4> products() { return {o(hidden()), gate_up(), down(hidden()), next()}; }

 private:
  DeviceArray<std::byte> values(int count) {
    return {on_,
            reference::encode(random_floats(static_cast<std::size_t>(count), ++seed_), s_.type)};
  }
  std::unique_ptr<Weight> weight(int features, int columns) {
    const auto bytes = reference::encode(
        random_floats(static_cast<std::size_t>(features) * static_cast<std::size_t>(columns),
                      ++seed_ + 50U * static_cast<unsigned>(rank_), 0.05F),
        s_.type);
    const WeightPart part{bytes.data(), s_.type, features, columns,
                          2U * static_cast<unsigned>(columns)};
    auto made = device().make_weight({&part, 1});
    device().finish_uploads();
    return made;
  }
  std::vector<float> floats_of_next() const {
    std::vector<float> as_floats = next_.get();
    std::vector<float> halves(as_floats.size());
    for (std::size_t i = 0; i < halves.size(); ++i) {
      halves[i] = static_cast<float>(
          reference::decode_at(reinterpret_cast<const std::byte*>(as_floats.data()), s_.type, i));
    }
    return halves;
  }

  DeviceUnderTest& on_;
  Shape s_;
  int rank_;
  unsigned seed_ = 0;
  DeviceArray<std::byte> attn_, mlp_, scratch_;
  DeviceArray<float> next_, norm_, bias_;
  std::unique_ptr<Weight> o_, gate_up_, down_, next_weight_;
  DeviceArray<std::byte> hidden_;
};

struct Result {
  std::vector<float> hidden, next;
  bool operator==(const Result&) const = default;
};

// A rank alone runs a chain. CUDA loads a kernel when it is first launched, which may wait for all
// that runs: kernels that wait for each other are loaded before they do.
void load_kernels(DeviceUnderTest& on, const Shape& s) {
  Layer layer(on, s, 0);
  const auto alone = make_peer_sum(*on.device, 0, 1, {.chain_columns = s.hidden});
  alone->connect(std::vector{alone->address()});
  const auto products = layer.products();
  on.device->linear_chain({products, 0b0101, alone.get()}, *on.stream);
  on.stream->synchronize();
}

class CudaChainOfRanks : public CudaTest,
                         public testing::WithParamInterface<std::tuple<int, Shape>> {};

// The sums as PeerSum makes all of them: of each rank's values, in the order of ranks.
TEST_P(CudaChainOfRanks, EqualsProductsAndSums) {
  const auto [world_size, s] = GetParam();
  ASSERT_TRUE(kManyQueues);
  struct Rank {
    std::unique_ptr<Stream> stream;
    std::unique_ptr<PeerSum> sum;
    std::unique_ptr<Layer> layer;
    std::unique_ptr<DeviceArray<std::byte>> part;
  };
  DeviceUnderTest on(make_cuda_device({.activation_type = s.type}));
  std::vector<Rank> ranks(static_cast<std::size_t>(world_size));
  // Before any upload makes streams of its own: ranks whose streams share one of the GPU's few
  // queues would wait for each other in vain.
  for (Rank& rank : ranks) rank.stream = on.device->make_stream(StreamKind::kCompute);
  load_kernels(on, s);
  std::vector<PeerSum::Address> addresses;
  const auto hidden_count = static_cast<std::size_t>(s.rows * s.hidden);
  for (int i = 0; i < world_size; ++i) {
    Rank& rank = ranks[static_cast<std::size_t>(i)];
    rank.sum = make_peer_sum(*on.device, i, world_size, {.chain_columns = s.hidden});
    rank.layer = std::make_unique<Layer>(on, s, i);
    rank.part =
        std::make_unique<DeviceArray<std::byte>>(on, std::vector<std::byte>(2 * hidden_count));
    addresses.push_back(rank.sum->address());
  }
  for (Rank& rank : ranks) rank.sum->connect(addresses);

  // Adds up what `product`(rank, out) makes, and gives it to all.
  const auto add_up = [&](const auto& product) {
    std::vector<float> total(hidden_count);
    for (Rank& rank : ranks) {
      on.run(&Device::linear, product(*rank.layer, rank.part->data()));
      const std::vector<float> part = floats_of(*rank.part, s.type);
      for (std::size_t i = 0; i < hidden_count; ++i) total[i] += part[i];
    }
    const auto bytes = reference::encode(total, s.type);
    for (Rank& rank : ranks) {
      on.device->copy_in(rank.layer->hidden(), bytes.data(), bytes.size(), *on.stream);
      on.stream->synchronize();
    }
  };
  const auto results = [&] {
    std::vector<Result> all;
    for (Rank& rank : ranks) {
      rank.stream->synchronize();
      all.push_back({rank.layer->hidden_values(), rank.layer->next_values()});
    }
    return all;
  };
  for (int seed = 0; seed < 5; ++seed) {
    for (Rank& rank : ranks) rank.layer->set_hidden(seed);
    add_up([](Layer& layer, void* out) { return layer.o(out); });
    for (Rank& rank : ranks) on.run(&Device::linear, rank.layer->gate_up());
    add_up([](Layer& layer, void* out) { return layer.down(out); });
    for (Rank& rank : ranks) on.run(&Device::linear, rank.layer->next());
    const auto expected = results();

    for (Rank& rank : ranks) {
      rank.layer->set_hidden(seed);
      rank.layer->forget_results();
    }
    for (Rank& rank : ranks) {
      const auto products = rank.layer->products();
      const LinearChainArgs chain{products, 0b0101, rank.sum.get()};
      ASSERT_TRUE(on.device->chains(chain));
      on.device->linear_chain(chain, *rank.stream);
    }
    EXPECT_EQ(results(), expected) << seed;
  }
  for (Rank& rank : ranks) rank.sum->disconnect();
}

INSTANTIATE_TEST_SUITE_P(
    Ranks, CudaChainOfRanks,
    testing::Combine(testing::Values(2, 3, 5),
                     testing::Values(Shape{64, 96, 48, 50}, Shape{512, 1024, 1536, 768},
                                     Shape{192, 576, 512, 320, DataType::kFp16},
                                     Shape{64, 8, 16, 501, DataType::kBf16, true},
                                     Shape{1024, 4104, 512, 2051, DataType::kBf16, true})));

TEST_F(CudaTest, WhatAChainDoesNotTake) {
  DeviceUnderTest on(make_cuda_device({}));
  const auto sum = make_peer_sum(*on.device, 0, 2, {.chain_columns = 96});
  Layer layer(on, {64, 96, 48, 50}, 0);
  const auto products = layer.products();
  EXPECT_TRUE(layer.device().chains({products, 0b0101, sum.get()}));
  EXPECT_FALSE(layer.device().chains({products, 0, sum.get()})) << "nothing to sum";
  EXPECT_FALSE(layer.device().chains({products, 0b0101, nullptr}));
  EXPECT_FALSE(layer.device().chains({products, 0b1101, sum.get()})) << "nobody takes the sum";
  EXPECT_FALSE(layer.device().chains({products, 0b0010, sum.get()})) << "of a gate's and an up's";
  Layer wider(on, {64, 104, 48, 50}, 0);
  EXPECT_FALSE(on.device->chains({wider.products(), 0b0101, sum.get()})) << "other columns";
  Layer many(on, {64, 96, 48, 50, DataType::kBf16, false, 2}, 0);
  EXPECT_FALSE(on.device->chains({many.products(), 0b0101, sum.get()})) << "many rows";
}

// Nobody waits for ever for a rank that never comes.
TEST_F(CudaTest, AChainGivesUpAtItsSumsEnd) {
  DeviceUnderTest on(make_cuda_device({}));
  Layer layer(on, {64, 96, 48, 50}, 0);
  auto own = make_peer_sum(*on.device, 0, 2, {.chain_columns = 96});
  const auto other = make_peer_sum(*on.device, 1, 2, {.chain_columns = 96});
  own->connect(std::vector{own->address(), other->address()});
  const auto products = layer.products();
  layer.device().linear_chain({products, 0b0101, own.get()}, *on.stream);
  own.reset();
  on.stream->synchronize();
}

class CudaChainsOfOneRank : public CudaTest, public testing::WithParamInterface<int> {};

// A rank alone sends to itself, so that many calls take no time. Chain i has calls 2i + 1 and
// 2i + 2; their numbers have 16 bits, and begin anew with call 65,535.
TEST_P(CudaChainsOfOneRank, EqualProductsAndSums) {
  constexpr int kTurn = 65'535 / 2;
  const int num_chains = GetParam();
  const Shape s{64, 96, 48, 50};
  DeviceUnderTest on(make_cuda_device({.activation_type = s.type}));
  const auto sum = make_peer_sum(*on.device, 0, 1, {.chain_columns = s.hidden});
  sum->connect(std::vector{sum->address()});
  Layer layer(on, s, 0);
  const auto products = layer.products();
  const LinearChainArgs chain{products, 0b0101, sum.get()};
  ASSERT_TRUE(on.device->chains(chain));
  const auto result = [&] {
    on.stream->synchronize();
    return Result{layer.hidden_values(), layer.next_values()};
  };
  for (int i = 0; i < num_chains; ++i) {
    const bool is_compared = std::abs(i - kTurn) <= 3 || i >= num_chains - 3;
    if (!is_compared) {
      on.device->linear_chain(chain, *on.stream);
      continue;
    }
    layer.set_hidden(i);
    for (const LinearArgs& product : products) on.run(&Device::linear, product);
    const Result expected = result();
    layer.set_hidden(i);
    layer.forget_results();
    on.device->linear_chain(chain, *on.stream);
    ASSERT_EQ(result(), expected) << "chain " << i;
  }
  sum->disconnect();
}

INSTANTIATE_TEST_SUITE_P(Chains, CudaChainsOfOneRank, testing::Values(3, 35'200));

}  // namespace
}  // namespace foretoken::kernels
