// PeerSum with all ranks in one process, on one GPU, each with its own stream.
#include "kernels/peer_sum.h"

#include "common/result.h"
#include "tests/kernels/cuda/cuda_test.h"

namespace foretoken::kernels {
namespace {

class CudaPeerSum : public CudaTest, public testing::WithParamInterface<int> {};

struct Rank {
  std::unique_ptr<PeerSum> sum;
  std::unique_ptr<Stream> stream;
  DeviceBuffer data;
};

float value_of(int rank, std::size_t i, int call) {
  return static_cast<float>(static_cast<int>((i * 7 + 13 * rank + 5 * call) % 31) - 15) / 8;
}

TEST_F(CudaTest, ASumsMemoryIsCounted) {
  constexpr std::size_t kMost = std::size_t{4} << 20;
  const auto device = make_cuda_device({.memory_bytes = std::size_t{64} << 20});
  const auto in_use = [&] { return device->memory_in_use(MemoryUse::kSums); };
  {
    const auto small = make_peer_sum(*device, 0, 2);
    const std::size_t least = in_use();
    EXPECT_GT(least, PeerSum::kMaxBytes);
    const auto large = make_peer_sum(*device, 0, 2, {.most_bytes = kMost});
    EXPECT_EQ(in_use(), 2 * least + 4 * kMost);
    EXPECT_THROW(make_peer_sum(*device, 0, 2, {.most_bytes = 4 * kMost}), Exception);
  }
  EXPECT_EQ(in_use(), 0U);
}

TEST_P(CudaPeerSum, EqualsThePlainSum) {
  const int world_size = GetParam();
  const DataType type = DataType::kBf16;
  const auto device = make_cuda_device({.activation_type = type});
  constexpr std::size_t kMost = PeerSum::kMaxBytes / 2;
  std::vector<Rank> ranks;
  std::vector<PeerSum::Address> addresses;
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.push_back({make_peer_sum(*device, rank, world_size),
                     device->make_stream(StreamKind::kCompute),
                     {*device, PeerSum::kMaxBytes, MemoryUse::kActivations}});
    addresses.push_back(ranks.back().sum->address());
  }
  for (Rank& rank : ranks) rank.sum->connect(addresses);

  // Lengths in any order: what an earlier call left in an inbox must not count.
  const std::size_t counts[] = {4, 4096, 8, 576, kMost, 4096, 4096, 12, kMost - 4, 0, 3584, 4};
  int call = 0;
  for (const std::size_t count : counts) {
    ++call;
    ASSERT_TRUE(ranks[0].sum->takes(count));
    for (int rank = 0; rank < world_size; ++rank) {
      std::vector<float> values(count);
      for (std::size_t i = 0; i < count; ++i) values[i] = value_of(rank, i, call);
      const std::vector<std::byte> bytes = reference::encode(values, type);
      Rank& own = ranks[static_cast<std::size_t>(rank)];
      device->copy_in(own.data.data(), bytes.data(), bytes.size(), *own.stream);
      own.stream->synchronize();
    }
    for (Rank& rank : ranks) rank.sum->run(rank.data.data(), count, *rank.stream);
    for (Rank& rank : ranks) {
      std::vector<std::byte> bytes(count * 2);
      device->copy_out(bytes.data(), rank.data.data(), bytes.size(), *rank.stream);
      rank.stream->synchronize();
      for (std::size_t i = 0; i < count; ++i) {
        double expected = 0;
        for (int r = 0; r < world_size; ++r) expected += value_of(r, i, call);  // exact in bf16
        ASSERT_EQ(reference::decode_at(bytes.data(), type, i), expected)
            << "call " << call << ", value " << i;
      }
    }
  }
  EXPECT_FALSE(ranks[0].sum->takes(kMost + 4));
  EXPECT_FALSE(ranks[0].sum->takes(3));
}

TEST_P(CudaPeerSum, JoinsParts) {
  const int world_size = GetParam();
  const auto device = make_cuda_device({});
  std::vector<Rank> ranks;
  std::vector<DeviceBuffer> joined;
  std::vector<PeerSum::Address> addresses;
  constexpr std::size_t kMost = PeerSum::kMaxBytes / sizeof(float);
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.push_back({make_peer_sum(*device, rank, world_size),
                     device->make_stream(StreamKind::kCompute),
                     {*device, PeerSum::kMaxBytes, MemoryUse::kActivations}});
    joined.emplace_back(*device, PeerSum::kMaxBytes * static_cast<std::size_t>(world_size),
                        MemoryUse::kActivations);
    addresses.push_back(ranks.back().sum->address());
  }
  for (Rank& rank : ranks) rank.sum->connect(addresses);

  struct Case {
    int width, last;  // the last rank's is another width
  };
  int call = 0;
  for (const Case& c : {Case{64128, 64000}, Case{2, 4}, Case{1002, 998}, Case{512, 514},
                        Case{32768, 32768}, Case{10, 4}, Case{65536, 2}}) {
    ++call;
    std::vector<int> widths(static_cast<std::size_t>(world_size), c.width);
    widths.back() = c.last;
    ASSERT_TRUE(ranks[0].sum->gathers(widths));
    std::vector<float> expected;
    for (int rank = 0; rank < world_size; ++rank) {
      const auto i = static_cast<std::size_t>(rank);
      std::vector<float> part(static_cast<std::size_t>(widths[i]));
      for (std::size_t at = 0; at < part.size(); ++at) part[at] = value_of(rank, at, call);
      device->copy_in(ranks[i].data.data(), part.data(), part.size() * sizeof(float),
                      *ranks[i].stream);
      ranks[i].stream->synchronize();
      expected.insert(expected.end(), part.begin(), part.end());
    }
    for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
      ranks[rank].sum->gather(ranks[rank].data.as<float>(), joined[rank].as<float>(), widths,
                              *ranks[rank].stream);
    }
    for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
      std::vector<float> all(expected.size());
      device->copy_out(all.data(), joined[rank].data(), all.size() * sizeof(float),
                       *ranks[rank].stream);
      ranks[rank].stream->synchronize();
      ASSERT_EQ(all, expected) << "call " << call << ", rank " << rank;
    }
  }
  EXPECT_FALSE(ranks[0].sum->gathers(std::vector{3}));
  EXPECT_FALSE(ranks[0].sum->gathers(std::vector{static_cast<int>(kMost) + 2}));
}

// Two begun at a time, more calls than there are places, of any lengths.
TEST_F(CudaTest, PeerSumInTwoStepsEqualsThePlainSum) {
  constexpr DataType kType = DataType::kBf16;
  constexpr std::size_t kMost = std::size_t{3} << 20;  // bytes
  constexpr int kRanks = 2;
  const auto device = make_cuda_device({.activation_type = kType});
  std::vector<Rank> ranks;
  std::vector<DeviceBuffer> others;  // a rank's second tensor
  std::vector<PeerSum::Address> addresses;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.push_back({make_peer_sum(*device, rank, kRanks, {.most_bytes = kMost}),
                     device->make_stream(StreamKind::kCompute),
                     {*device, kMost, MemoryUse::kActivations}});
    others.emplace_back(*device, kMost, MemoryUse::kActivations);
    addresses.push_back(ranks.back().sum->address());
  }
  for (Rank& rank : ranks) rank.sum->connect(addresses);
  EXPECT_FALSE(ranks[0].sum->begins(kMost / 2 + 8));
  EXPECT_FALSE(ranks[0].sum->begins(4096));  // as fast in one step

  const std::size_t counts[] = {kMost / 2, std::size_t{1} << 19, (std::size_t{1} << 20) + 8};
  for (int call = 0; call < 2100; ++call) {
    const std::size_t count = counts[call % 3];
    const auto data_of = [&](int rank, int of_call) {
      const auto i = static_cast<std::size_t>(rank);
      return (of_call % 2 == 0 ? ranks[i].data : others[i]).data();
    };
    const bool looks = call < 12 || call % 500 == 7;
    for (int rank = 0; rank < kRanks; ++rank) {
      Rank& own = ranks[static_cast<std::size_t>(rank)];
      ASSERT_TRUE(own.sum->begins(count));
      if (looks) {
        std::vector<float> values(count);
        for (std::size_t i = 0; i < count; ++i) values[i] = value_of(rank, i, call);
        const std::vector<std::byte> bytes = reference::encode(values, kType);
        device->copy_in(data_of(rank, call), bytes.data(), bytes.size(), *own.stream);
        own.stream->synchronize();
      }
      own.sum->begin(data_of(rank, call), count, *own.stream);
    }
    if (call == 0) continue;  // one more is under way
    for (Rank& rank : ranks) rank.sum->end(*rank.stream);
    if (!looks) continue;
    for (Rank& rank : ranks) rank.sum->end(*rank.stream);
    for (int rank = 0; rank < kRanks; ++rank) {
      Rank& own = ranks[static_cast<std::size_t>(rank)];
      std::vector<std::byte> bytes(count * 2);
      device->copy_out(bytes.data(), data_of(rank, call), bytes.size(), *own.stream);
      own.stream->synchronize();
      for (std::size_t i = 0; i < count; ++i) {
        const float expected = value_of(0, i, call) + value_of(1, i, call);  // exact in bf16
        ASSERT_EQ(reference::decode_at(bytes.data(), kType, i), expected)
            << "call " << call << ", value " << i;
      }
    }
    ++call;
    for (int rank = 0; rank < kRanks; ++rank) {
      Rank& own = ranks[static_cast<std::size_t>(rank)];
      own.sum->begin(data_of(rank, call), counts[call % 3], *own.stream);
    }
  }
  for (Rank& rank : ranks) rank.sum->end(*rank.stream);
  for (Rank& rank : ranks) rank.stream->synchronize();
}

// Nobody waits for ever for a rank that never comes.
TEST_F(CudaTest, PeerSumGivesUpAtItsEnd) {
  const auto device = make_cuda_device({});
  const auto stream = device->make_stream(StreamKind::kCompute);
  const DeviceBuffer data(*device, 8192, MemoryUse::kActivations);
  auto own = make_peer_sum(*device, 0, 2);
  const auto other = make_peer_sum(*device, 1, 2);
  own->connect(std::vector{own->address(), other->address()});
  own->run(data.data(), 4096, *stream);
  own.reset();
  stream->synchronize();
}

TEST_F(CudaTest, PeerSumInTwoStepsGivesUpAtItsEnd) {
  constexpr std::size_t kBytes = std::size_t{1} << 20;
  const auto device = make_cuda_device({});
  const auto stream = device->make_stream(StreamKind::kCompute);
  const DeviceBuffer data(*device, kBytes, MemoryUse::kActivations);
  auto own = make_peer_sum(*device, 0, 2, {.most_bytes = kBytes});
  const auto other = make_peer_sum(*device, 1, 2, {.most_bytes = kBytes});
  own->connect(std::vector{own->address(), other->address()});
  own->begin(data.data(), kBytes / 2, *stream);
  own->end(*stream);
  own.reset();
  stream->synchronize();
}

INSTANTIATE_TEST_SUITE_P(Ranks, CudaPeerSum, testing::Values(1, 2, 3, 4, 8));

}  // namespace
}  // namespace foretoken::kernels
