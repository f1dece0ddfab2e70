// The door, with a store behind it and the CPU device's ops in the arena.
#include "kvstore/kv_store.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kvstore/internal/stripe_mapping.h"
#include "tests/kernels/kv_sequence.h"
#include "tests/kvstore/running_server.h"

namespace foretoken::kvstore {
namespace {

using kernels::FetchTable;
using kernels::KvSequence;
using kernels::StreamKind;

constexpr unsigned kSeed = 20261122;
constexpr std::size_t kArenaBytes = 32 << 20;
constexpr int kScratchTokens = 768;

PrefixKey key_of(int prompt, int segment) {
  PrefixKey key;
  key.bytes[0] = static_cast<std::uint8_t>(prompt);
  key.bytes[1] = static_cast<std::uint8_t>(segment);
  return key;
}
std::vector<PrefixKey> keys_of(int prompt, int count) {
  std::vector<PrefixKey> keys;
  for (int i = 0; i < count; ++i) keys.push_back(key_of(prompt, i));
  return keys;
}

class KvStoreTest : public testing::Test {
 protected:
  KvStoreTest()
      : server(kArenaBytes),
        device(kernels::make_cpu_device({1, std::size_t{64} << 20})),
        compute(device->make_stream(StreamKind::kCompute)),
        copy(device->make_stream(StreamKind::kCopy)) {}

  std::unique_ptr<KvStore> connect(int rank, int epoch = 1, bool guard = false) {
    StoreClientConfig config = test_client(server.socket(), rank, epoch);
    config.guard_arena = guard;
    auto store = KvStore::connect(config, *device).value_or_throw();
    EXPECT_TRUE(ready(*store));
    return store;
  }

  // Fills segments of a reserved sequence from random rows; returns K of the scratch.
  std::vector<std::byte> fill(KvStore& store, KvSequence& kv, int num_tokens, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::byte> k(2 * kScratchTokens * 128);
    for (auto& byte : k) byte = static_cast<std::byte>(random());
    for (int layer = 0; layer < 3; ++layer) {
      store.pack({k.data(), k.data(), kScratchTokens, 2, 64, layer, 0, blocks_for(num_tokens),
                  num_tokens, true, &kv.view},
                 *compute);
    }
    return k;
  }
  static void bind(KvSequence& kv, const Reservation& reservation) {
    kv.view.slabs = reservation.slabs.data();
    kv.view.max_segments = reservation.num_segments;
  }

  RunningServer server;
  std::unique_ptr<kernels::Device> device;
  std::unique_ptr<kernels::Stream> compute;
  std::unique_ptr<kernels::Stream> copy;
};

TEST_F(KvStoreTest, WhatNoMessageCanAskForIsRefused) {
  const auto store = connect(0);
  for (const int segments : {kMaxSegments, kMaxSegments + 1, 1 << 20}) {
    const auto kv = store->reserve(SequenceId{1}, {}, segments);
    ASSERT_FALSE(kv);
    EXPECT_EQ(kv.error().code, ErrorCode::kInvalidArgument) << segments;
  }
  EXPECT_TRUE(store->reserve(SequenceId{1}, {}, 1)) << "the store is there still";
}

TEST_F(KvStoreTest, APrefixOfOneSequenceServesTheNext) {
  const auto store = connect(0);
  KvSequence kv(test_client("", 0).shape, 8, 48);
  const auto first = store->reserve(SequenceId{1}, keys_of(1, 3), 3);
  ASSERT_TRUE(first) << first.error().message;
  EXPECT_EQ(first->hit_segments, 0);
  bind(kv, *first);
  const auto k = fill(*store, kv, kScratchTokens, kSeed);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(store->commit(SequenceId{1}, i, key_of(1, i)));
  ASSERT_TRUE(store->release(SequenceId{1}));

  const auto second = store->reserve(SequenceId{2}, keys_of(1, 2), 3);
  ASSERT_TRUE(second);
  EXPECT_EQ(second->hit_segments, 2);
  KvSequence reader(test_client("", 0).shape, 8, 48);
  bind(reader, *second);
  std::vector<std::byte> again(k.size());
  store->unpack({again.data(), again.data(), kScratchTokens, 2, 64, 1, 0, 32, &reader.view}, *copy);
  copy->synchronize();
  EXPECT_EQ(reader.mismatches, 0U);
  for (const std::size_t head : {0, 1}) {
    const std::size_t begin = head * kScratchTokens * 128;
    EXPECT_EQ(std::memcmp(again.data() + begin, k.data() + begin, 512 * 128), 0);
  }
}

TEST_F(KvStoreTest, FetchBringsBlocksAndWaitOrdersThem) {
  const auto store = connect(0);
  const auto shape = test_client("", 0).shape;
  KvSequence kv(shape, 8, 48);
  const auto reservation = store->reserve(SequenceId{1}, {}, 3);
  ASSERT_TRUE(reservation);
  bind(kv, *reservation);
  fill(*store, kv, kScratchTokens, kSeed);
  FetchTable fetches(shape, 4);
  for (int layer = 0; layer < 3; ++layer) {
    for (int head = 0; head < 2; ++head) {
      kv.place(layer, head, 30 + head, 2);
      fetches.counts[kv.head(layer, head)] = 1;
      fetches.entries[kv.head(layer, head) * 4] = {30 + head, 2};
    }
  }
  for (int layer = 0; layer < 3; ++layer) store->fetch(layer, 1, &kv.view, &fetches.view, 1, *copy);
  for (int layer = 0; layer < 3; ++layer) {
    store->wait(layer, *compute);
    for (int head = 0; head < 2; ++head) {
      const std::byte* slab = reservation->slabs[static_cast<std::size_t>(head * 3 + 1)];
      EXPECT_EQ(std::memcmp(kv.slot_data(layer, head, 2),
                            slab + kernels::slab_block_offset(shape, layer, 30 + head),
                            shape.block_bytes()),
                0);
    }
  }
  reservation->slabs[1][kernels::slab_block_offset(shape, 2, 30) + 5] ^= std::byte{1};
  store->fetch(2, 1, &kv.view, &fetches.view, 1, *copy);
  copy->synchronize();
  EXPECT_EQ(kv.mismatches, 1U);
  EXPECT_EQ(kv.slot(2, 0, 30), kernels::kAbsent);
}

// A limit on the rank's address space, say: nothing to try again, so not an error that may pass.
TEST_F(KvStoreTest, AnArenaThatCanNotBeMappedIsADeviceError) {
  const FileDescriptor memory(memfd_create("arena", MFD_CLOEXEC));
  const ArenaLayout larger_than_any_address_space{1, std::size_t{1} << 22, 1U << 31};
  try {
    const StripeMapping mapping(memory.get(), larger_than_any_address_space, 0, 1, *device,
                                [](std::uint32_t wanted) { return wanted; });
    FAIL() << "mapped";
  } catch (const Exception& failure) {
    EXPECT_EQ(exit_code(failure.error().code), 5);
    EXPECT_NE(failure.error().message.find("--kv-host-gib"), std::string::npos);
  }
}

// A piece is 512 slabs here, and the arena settles within the second one's.
TEST_F(KvStoreTest, ARankMapsAndRegistersWhatThereIs) {
  const ArenaLayout layout{3, kStripeAlignment, 1300};
  const FileDescriptor memory = make_shared_memory("test", layout.arena_bytes()).value_or_throw();
  std::vector<std::uint32_t> asked;
  const StripeMapping mapping(memory.get(), layout, 1, 2, *device, [&](std::uint32_t wanted) {
    asked.push_back(wanted);
    return std::min(wanted, 700U);
  });
  EXPECT_EQ(asked, (std::vector<std::uint32_t>{512, 1024}));
  EXPECT_EQ(mapping.num_slabs(), 700U);
  ASSERT_EQ(mapping.memory().size(), 2U);
  for (int head = 0; head < 2; ++head) {
    const auto stripe = mapping.memory()[static_cast<std::size_t>(head)];
    EXPECT_EQ(stripe.size(), 700 * layout.slab_bytes);
    for (const std::uint32_t slab : {0U, 511U, 512U, 699U}) {
      EXPECT_EQ(mapping.slab(head, SlabIndex{slab}), stripe.data() + layout.slab_bytes * slab);
      EXPECT_EQ(mapping.host_slab(head, SlabIndex{slab}), mapping.slab(head, SlabIndex{slab}));
    }
    unsigned char resident = 0;
    EXPECT_NE(mincore(stripe.data() + stripe.size(), 4096, &resident), 0) << "mapped behind it";
  }
  const auto all = [](std::uint32_t wanted) { return wanted; };
  const StripeMapping whole(memory.get(), layout, 0, 1, *device, all);
  EXPECT_EQ(whole.memory()[0].size(), layout.stripe_bytes());
  const auto none = [](std::uint32_t) { return 0U; };
  EXPECT_THROW(StripeMapping(memory.get(), layout, 0, 1, *device, none), Exception);
}

TEST_F(KvStoreTest, RanksShareAHeadAndAgreeOnHits) {
  const auto low = connect(0);
  const auto high = connect(1);
  const auto of_low = low->reserve(SequenceId{1}, {}, 2);
  const auto of_high = high->reserve(SequenceId{1}, {}, 2);
  ASSERT_TRUE(of_low && of_high);
  of_low->slabs[2][100] = std::byte{42};  // head 1 of the model, segment 0
  EXPECT_EQ(of_high->slabs[0][100], std::byte{42});
  // The lower rank publishes its heads, the other its own; head 1 twice.
  ASSERT_TRUE(low->commit(SequenceId{1}, 0, key_of(1, 0)));
  ASSERT_TRUE(high->commit(SequenceId{1}, 0, key_of(1, 0)));
  ASSERT_TRUE(low->commit(SequenceId{1}, 1, key_of(1, 1)));  // head 2 lacks this one
  ASSERT_TRUE(low->stat() && high->stat());                  // one-way requests have arrived

  auto again_low = low->reserve(SequenceId{2}, keys_of(1, 2), 2);
  auto again_high = high->reserve(SequenceId{2}, keys_of(1, 2), 2);
  ASSERT_TRUE(again_low && again_high);
  EXPECT_EQ(again_low->hit_segments, 2);
  EXPECT_EQ(again_high->hit_segments, 1);
  EXPECT_EQ(again_high->head_hits, (std::vector<int>{2, 1}));
  ASSERT_TRUE(low->use(*again_low, 1));
  ASSERT_TRUE(high->use(*again_high, 1));
  EXPECT_EQ(again_low->head_hits, (std::vector<int>{1, 1}));
  EXPECT_NE(again_low->slabs[3], of_low->slabs[3]) << "sequence 1 still reads it";
  again_low->slabs[3][100] = std::byte{43};
  EXPECT_EQ(again_high->slabs[1][100], std::byte{43}) << "both ranks were given the same new slab";
}

TEST_F(KvStoreTest, MemoryReturnsToItsBaseline) {
  const auto watcher = connect(1);
  const auto baseline = watcher->stat();
  ASSERT_TRUE(baseline);
  {
    const auto store = connect(0);
    for (std::uint64_t i = 0; i < 5; ++i) ASSERT_TRUE(store->reserve(SequenceId{i}, {}, 4));
    ASSERT_TRUE(store->release(SequenceId{3}));
    EXPECT_EQ(store->stat()->sequences, 4);
  }  // destroyed with four sequences open
  EXPECT_TRUE(eventually(*watcher, [&](const StoreStat& stat) {
    return stat.leases == baseline->leases && stat.slabs_free == baseline->slabs_free &&
           stat.slabs_used == 0 && stat.sequences == 0;
  }));
}

TEST_F(KvStoreTest, SaysWhenThereIsNoRoom) {
  const auto store = connect(0);
  const int all = static_cast<int>(store->slabs_per_head());
  const auto never = store->reserve(SequenceId{1}, {}, all + 1);
  ASSERT_FALSE(never);
  EXPECT_EQ(never.error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(store->reserve(SequenceId{1}, {}, all));
  const auto later = store->reserve(SequenceId{2}, {}, 1);
  ASSERT_FALSE(later);
  EXPECT_EQ(later.error().code, ErrorCode::kExhausted);
  ASSERT_TRUE(store->release(SequenceId{1}));
  EXPECT_TRUE(store->reserve(SequenceId{2}, {}, 1));
}

TEST_F(KvStoreTest, RefusesAnotherModelAndASecondHello) {
  const auto store = connect(0);
  StoreClientConfig other = test_client(server.socket(), 1);
  other.model_hash = "another-model";
  const auto refused = KvStore::connect(other, *device);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(refused.error().message.find("another-model"), std::string::npos);
  other = test_client(server.socket(), 1);
  other.shape.head_dim = 128;
  EXPECT_FALSE(KvStore::connect(other, *device));
  EXPECT_FALSE(KvStore::connect(test_client(server.socket(), 0), *device)) << "same epoch";
  EXPECT_FALSE(KvStore::connect(test_client(server.socket(), 0, 0), *device)) << "older epoch";
}

TEST_F(KvStoreTest, CountsOneWayRequestsThatWereWrong) {
  const auto store = connect(0);
  ASSERT_TRUE(store->release(SequenceId{99}));
  ASSERT_TRUE(store->commit(SequenceId{99}, 0, key_of(1, 1)));
  EXPECT_EQ(store->stat()->bad_requests, 2);
}

TEST_F(KvStoreTest, OpsWorkUnderTheGuard) {
  const auto store = connect(0, 1, /*guard=*/true);
  const auto shape = test_client("", 0).shape;
  KvSequence kv(shape, 8, 48);
  const auto reservation = store->reserve(SequenceId{1}, {}, 3);
  ASSERT_TRUE(reservation);
  bind(kv, *reservation);
  const auto k = fill(*store, kv, 512, kSeed);
  kv.length = 527;
  for (int layer = 0; layer < 3; ++layer) {
    for (int head = 0; head < 2; ++head) kv.place(layer, head, 32, 1);
  }
  device->advance({&kv.view, 1}, *compute);
  store->write_through({&kv.view, 1, true}, *compute);
  FetchTable fetches(shape, 4);
  std::ranges::fill(fetches.counts, 1);
  for (std::size_t i = 0; i < fetches.counts.size(); ++i) fetches.entries[i * 4] = {5, 3};
  store->fetch(0, 1, &kv.view, &fetches.view, 1, *copy);
  store->wait(0, *compute);
  EXPECT_EQ(std::memcmp(kv.slot_data(0, 0, 3), k.data() + 5 * 16 * 128, 16 * 128), 0);
  copy->synchronize();
  EXPECT_EQ(kv.mismatches, 0U);
}

using KvStoreDeathTest = KvStoreTest;
TEST_F(KvStoreDeathTest, TheGuardStopsEverybodyElse) {
  const auto store = connect(0, 1, /*guard=*/true);
  const auto reservation = store->reserve(SequenceId{1}, {}, 1);
  ASSERT_TRUE(reservation);
  const auto write = [&] {
    std::signal(SIGSEGV, SIG_DFL);  // a sanitizer would report what is wanted here
    reservation->slabs[0][0] = std::byte{1};
  };
  EXPECT_EXIT(write(), testing::KilledBySignal(SIGSEGV), "");
}

TEST(KvStoreConnect, SaysThatNobodyAnswers) {
  const TestFolder folder;
  const auto device = kernels::make_cpu_device({1, 1 << 20});
  const auto store = KvStore::connect(test_client(folder.socket(), 0), *device);
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().code, ErrorCode::kUnavailable);
}

TEST(KvStoreConnect, RefusesAnArenaThatHoldsNothing) {
  const RunningServer server(1 << 20);
  const auto device = kernels::make_cpu_device({1, 1 << 20});
  const auto store = KvStore::connect(test_client(server.socket(), 0), *device);
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().code, ErrorCode::kConfig);
}

// Memory is there for some of the 24 pieces that this one is touched in.
TEST(KvStoreConnect, ARankHasWhatTheArenaHasSettledFor) {
  std::atomic<int> calls{0};
  const auto twelve = [&calls](std::byte*, std::size_t) { return ++calls <= 12; };
  const RunningServer server(std::size_t{1} << 30, std::nullopt, twelve);
  const auto device = kernels::make_cpu_device({1, std::size_t{64} << 20});
  const auto early = KvStore::connect(test_client(server.socket(), 0), *device).value_or_throw();
  ASSERT_TRUE(ready(*early));
  const auto store = KvStore::connect(test_client(server.socket(), 1), *device).value_or_throw();
  EXPECT_EQ(store->slabs_per_head(), store->stat()->slabs_total);
  EXPECT_LT(static_cast<std::size_t>(store->slabs_per_head()),
            ArenaLayout::fit(std::size_t{1} << 30, 3, test_client("", 0).shape.slab_bytes())
                .slabs_per_head);
  const auto all = store->reserve(SequenceId{1}, {}, static_cast<int>(store->slabs_per_head()));
  ASSERT_TRUE(all);
  for (std::byte* slab : all->slabs) *slab = std::byte{1};
}

TEST(KvStoreConnect, RefusesAnArenaThatTheMachineDoesNotHave) {
  const RunningServer server(std::size_t{1} << 50);
  const auto device = kernels::make_cpu_device({1, 1 << 20});
  const auto store = KvStore::connect(test_client(server.socket(), 0), *device);
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().code, ErrorCode::kConfig);
}

}  // namespace
}  // namespace foretoken::kvstore
