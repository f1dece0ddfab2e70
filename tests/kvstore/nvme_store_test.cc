// The store with an NVMe tier, as a rank meets it: prefixes come back from the file.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <fstream>
#include <functional>
#include <memory>
#include <thread>

#include "kvstore/internal/connection.h"
#include "tests/kvstore/running_server.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {
namespace {

// Two slabs a head: a third segment pushes one out.
constexpr std::size_t kArenaBytes = 6 << 20;
const ModelIdentity kModel{"test-model", 3, 3, 64, kernels::DataType::kFp16};

PrefixKey key_of(std::uint32_t prompt) { return test_name(0, prompt).key; }

class NvmeStoreTest : public testing::Test {
 protected:
  void start(NvmeReuse reuse = NvmeReuse::kKeepSlabs) {
    server =
        std::make_unique<RunningServer>(kArenaBytes, NvmeConfig{nvme_folder(), 64 << 20, reuse});
  }
  std::string nvme_folder() const { return folder.path() / "nvme"; }
  std::unique_ptr<KvStore> connect(int rank = 0) {
    auto store = KvStore::connect(test_client(server->socket(), rank), *device).value_or_throw();
    EXPECT_TRUE(ready(*store));
    return store;
  }
  // The store ends and begins again, with nothing in its arena and so many slots in its file.
  void restart_store(std::unique_ptr<KvStore>& store, int slots) {
    store.reset();
    server.reset();
    const auto num_slots = static_cast<std::uint32_t>(slots);
    server = std::make_unique<RunningServer>(
        kArenaBytes,
        NvmeConfig{nvme_folder(), NvmeGeometry{kModel.slab_bytes(), num_slots}.file_bytes(),
                   NvmeReuse::kKeepSlabs});
    store = connect();
  }
  // Slabs of a head of the arena.
  static int slabs_per_head(KvStore& store) { return static_cast<int>(store.slabs_per_head()); }

  // Comes again while the prefix is on its way, as a group does: with a new name.
  Result<Reservation> reserve(KvStore& store, const PrefixKey& key) {
    for (;; std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
      next = SequenceId{raw(next) + 1};
      auto kv = store.reserve(next, std::span(&key, 1), 1);
      if (kv || kv.error().code != ErrorCode::kPending) return kv;
    }
  }

  // A prompt of one segment: filled and published, or found.
  void write(KvStore& store, std::uint32_t prompt) {
    const PrefixKey key = key_of(prompt);
    const auto kv = reserve(store, key);
    ASSERT_TRUE(kv) << kv.error().message;
    for (int head = 0; kv->hit_segments == 0 && head < 2; ++head) {
      const auto slab = test_slab({head, key}, kModel);
      std::memcpy(kv->slabs[static_cast<std::size_t>(head)], slab.data(), slab.size());
    }
    ASSERT_TRUE(store.commit(next, 0, key));
    ASSERT_TRUE(store.release(next));
  }
  // Whether the prompt is a hit; its bytes are right then.
  bool finds(KvStore& store, std::uint32_t prompt) {
    const PrefixKey key = key_of(prompt);
    const auto kv = reserve(store, key);
    EXPECT_TRUE(kv) << kv.error().message;
    const bool hit = kv->hit_segments == 1;
    for (int head = 0; hit && head < 2; ++head) {
      EXPECT_TRUE(same_slab(kv->slabs[static_cast<std::size_t>(head)], {head, key}, kModel));
    }
    EXPECT_TRUE(store.release(next));
    return hit;
  }
  // One of several segments.
  void write_all(KvStore& store, std::span<const PrefixKey> keys) {
    next = SequenceId{raw(next) + 1};
    const auto kv = store.reserve(next, keys, static_cast<int>(keys.size()));
    ASSERT_TRUE(kv) << kv.error().message;
    ASSERT_EQ(kv->hit_segments, 0);
    for (std::size_t segment = 0; segment < keys.size(); ++segment) {
      for (int head = 0; head < 2; ++head) {
        const auto slab = test_slab({head, keys[segment]}, kModel);
        std::memcpy(kv->slabs[static_cast<std::size_t>(head) * keys.size() + segment], slab.data(),
                    slab.size());
      }
      ASSERT_TRUE(store.commit(next, static_cast<int>(segment), keys[segment]));
    }
    ASSERT_TRUE(store.release(next));
  }
  testing::AssertionResult written(KvStore& store, std::int64_t slabs) {
    return eventually(store,
                      [&](const StoreStat& stat) { return stat.nvme.slabs_written >= slabs; });
  }

  TestFolder folder;
  std::unique_ptr<RunningServer> server;
  std::unique_ptr<kernels::Device> device = kernels::make_cpu_device({1, 1 << 20});
  SequenceId next{1};
};

TEST_F(NvmeStoreTest, WhatTheArenaGaveUpComesBack) {
  start();
  const auto store = connect();
  const int count = 4 * slabs_per_head(*store);
  for (int i = 0; i < count; ++i) {
    write(*store, static_cast<std::uint32_t>(i));
    ASSERT_TRUE(written(*store, 2 * (i + 1)));
  }
  for (int i = 0; i < count; ++i) EXPECT_TRUE(finds(*store, static_cast<std::uint32_t>(i))) << i;
  const NvmeStat stat = store->stat()->nvme;
  EXPECT_EQ(stat.state, NvmeState::kOnline);
  EXPECT_EQ(stat.slabs_held, 2 * count);
  EXPECT_GE(stat.slabs_read, 2 * (count - slabs_per_head(*store)));
  EXPECT_EQ(stat.dropped + stat.io_errors + stat.checksum_failures, 0);
}

TEST_F(NvmeStoreTest, ARestartFindsWhatWasWritten) {
  start();
  {
    const auto store = connect();
    write(*store, 1);  // not waited for: the store writes it at its end
  }
  server.reset();
  start();
  EXPECT_TRUE(finds(*connect(), 1));
  server.reset();
  start(NvmeReuse::kStartAfresh);
  EXPECT_FALSE(finds(*connect(), 1));
  server.reset();
  EXPECT_FALSE(std::filesystem::exists(nvme_folder() + "/kv-slabs"));
}

// Without its first segments the rest of a prefix is of no use.
TEST_F(NvmeStoreTest, APrefixGivesWayFromItsEnd) {
  const std::vector keys{key_of(1), key_of(2), key_of(3)};
  std::unique_ptr<KvStore> store;
  const auto restart = [&] { restart_store(store, 8); };
  const auto hits = [&] {
    for (;; std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
      next = SequenceId{raw(next) + 1};
      const auto kv = store->reserve(next, keys, 3);
      if (!kv && kv.error().code == ErrorCode::kPending) continue;
      EXPECT_TRUE(store->release(next));
      return kv->hit_segments;
    }
  };
  restart();
  write_all(*store, keys);  // two slots are left
  ASSERT_TRUE(written(*store, 6));
  write(*store, 11);
  write(*store, 12);
  ASSERT_TRUE(written(*store, 10));
  restart();
  EXPECT_EQ(hits(), 2) << "of what was written, the last segment went";
  write(*store, 13);
  ASSERT_TRUE(written(*store, 2));  // over 11 ...
  write(*store, 14);
  ASSERT_TRUE(written(*store, 4));  // ... 12
  write(*store, 15);
  ASSERT_TRUE(written(*store, 6));
  restart();
  EXPECT_EQ(hits(), 1) << "of what was found, too";
}

// The second of two sequences with the same prompt goes on: what it adds builds on a segment that
// the arena holds in the first one's slabs.
TEST_F(NvmeStoreTest, WhatBuildsOnAnothersSegmentGivesWayBeforeIt) {
  std::unique_ptr<KvStore> store;
  const auto restart = [&] { restart_store(store, 4); };
  const auto fill = [&](SequenceId sequence, const Reservation& kv, int segment, std::uint32_t id) {
    for (int head = 0; head < 2; ++head) {
      const auto slab = test_slab({head, key_of(id)}, kModel);
      const std::size_t place = static_cast<std::size_t>(head) * kv.slabs.size() / 2;
      std::memcpy(kv.slabs[place + static_cast<std::size_t>(segment)], slab.data(), slab.size());
    }
    ASSERT_TRUE(store->commit(sequence, segment, key_of(id)));
  };
  restart();
  {
    const auto first = store->reserve(SequenceId{100}, {}, 1).value();
    const auto second = store->reserve(SequenceId{101}, {}, 2).value();
    fill(SequenceId{100}, first, 0, 1);
    fill(SequenceId{101}, second, 0, 1);
    fill(SequenceId{101}, second, 1, 2);
    ASSERT_TRUE(written(*store, 4));
    ASSERT_TRUE(store->release(SequenceId{100}) && store->release(SequenceId{101}));
  }
  restart();
  write(*store, 11);  // over the two slabs that give way first
  ASSERT_TRUE(written(*store, 2));
  restart();
  EXPECT_TRUE(finds(*store, 1));
  EXPECT_FALSE(finds(*store, 2));
}

// Two of three prompts fill the file, and the one that was written first is asked for again.
TEST_F(NvmeStoreTest, WhatWasUsedLastIsThereLongestAfterARestartToo) {
  std::unique_ptr<KvStore> store;
  const auto restart = [&] { restart_store(store, 4); };
  restart();
  write(*store, 1);
  write(*store, 2);
  ASSERT_TRUE(written(*store, 4));
  EXPECT_TRUE(finds(*store, 1));
  restart();
  write(*store, 3);
  ASSERT_TRUE(written(*store, 2));
  restart();
  EXPECT_TRUE(finds(*store, 1));
  EXPECT_FALSE(finds(*store, 2));
}

// It was written behind, and found bad: nobody reads it from the arena either, and it is computed
// anew elsewhere.
TEST_F(NvmeStoreTest, ASlabThatIsFoundBadServesNobody) {
  start();
  const auto store = connect();
  const PrefixKey key = key_of(1);
  const auto kv = store->reserve(SequenceId{100}, std::span(&key, 1), 1).value();
  for (int head = 0; head < 2; ++head) {
    auto slab = test_slab({head, key}, kModel);
    slab[1000] ^= static_cast<std::byte>(head);  // of head 1 alone
    std::memcpy(kv.slabs[static_cast<std::size_t>(head)], slab.data(), slab.size());
  }
  ASSERT_TRUE(store->commit(SequenceId{100}, 0, key));
  ASSERT_TRUE(eventually(
      *store, [](const StoreStat& stat) { return stat.nvme.host_checksum_failures == 1; }));
  const auto second = store->reserve(SequenceId{101}, std::span(&key, 1), 1).value();
  EXPECT_EQ(second.head_hits, (std::vector{1, 0}));
  EXPECT_NE(second.slabs[1], kv.slabs[1]);
  ASSERT_TRUE(store->release(SequenceId{100}));
  ASSERT_TRUE(store->release(SequenceId{101}));
  write(*store, 1);
  ASSERT_TRUE(written(*store, 2));
  EXPECT_TRUE(finds(*store, 1));
}

// What reading takes is known from the first one on; computing takes nothing here.
TEST_F(NvmeStoreTest, WhatIsComputedSoonerIsNotRead) {
  start();
  const auto store = connect();
  const int count = 2 * slabs_per_head(*store);
  for (int i = 0; i < count; ++i) {
    write(*store, static_cast<std::uint32_t>(i));
    ASSERT_TRUE(written(*store, 2 * (i + 1)));
  }
  ASSERT_TRUE(store->note_prefill({.computed = 1'000'000'000}));
  EXPECT_TRUE(finds(*store, 0));
  EXPECT_EQ(store->stat()->nvme.tokens_passed_over, 0);
  EXPECT_FALSE(finds(*store, 1));
  EXPECT_FALSE(finds(*store, 2));
  const NvmeStat stat = store->stat()->nvme;
  EXPECT_EQ(stat.tokens_passed_over, 512);
  EXPECT_EQ(stat.slabs_read, 2);
  EXPECT_TRUE(finds(*store, static_cast<std::uint32_t>(count - 1))) << "it is in the arena";
}

// The arena has ten slabs a head: as many as 13 segments of three layers must have, 29 frames.
constexpr int kManySegments = 13;

TEST_F(NvmeStoreTest, ASequenceLargerThanTheArenaIsLentSlots) {
  server = std::make_unique<RunningServer>(
      kArenaBytes, NvmeConfig{nvme_folder(), 16 << 20, NvmeReuse::kStartAfresh});
  const auto store = connect();
  const auto free = store->stat()->slabs_free;
  const PrefixKey key = key_of(1);
  for (int i = 0; i < 5; ++i) {  // slots come back: the file has room for three such sequences
    const SequenceId id{static_cast<std::uint64_t>(100 + i)};
    auto kv = store->reserve(id, std::span(&key, 1), kManySegments);
    ASSERT_TRUE(kv) << kv.error().message;
    ASSERT_NE(kv->outsized, nullptr);
    EXPECT_EQ(kv->hit_segments, 0);
    EXPECT_TRUE(kv->slabs.empty());
    EXPECT_LT(store->stat()->slabs_free, free);
    ASSERT_TRUE(store->use(*kv, 0));
    ASSERT_TRUE(kv->outsized->make_room(1, {0, kManySegments}));
    kv->outsized.reset();
    ASSERT_TRUE(store->release(id));
  }
  EXPECT_EQ(store->stat()->slabs_free, free);
}

// Of all slots that the file has: the idle tier may be checking one.
Reservation reserve_slots(KvStore& store, SequenceId id, std::span<const PrefixKey> keys,
                          int num_segments) {
  for (;; std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
    auto kv = store.reserve(id, keys, num_segments);
    if (kv || kv.error().code != ErrorCode::kExhausted) return std::move(kv).value();
  }
}

constexpr int kSomeSegments = 11;  // must have nine slabs a head, which leaves one to others

// What a prompt's first segments hold: [segments, 2 heads], of rank 0 or another one.
struct Slabs {
  explicit Slabs(std::span<const PrefixKey> keys, const ModelIdentity& model = kModel,
                 int first_head = 0)
      : shape(model.slab_shape()), num_segments(static_cast<int>(keys.size())) {
    for (const PrefixKey& key : keys) {
      for (int head = 0; head < 2; ++head) {
        slabs.push_back(test_slab({first_head + head, key}, model));
      }
    }
  }
  const std::byte* run(int layer, int head, int segment) const {
    return slabs[static_cast<std::size_t>(2 * segment + head)].data() +
           static_cast<std::size_t>(layer) * shape.run_bytes();
  }
  const std::byte* checksums(int layer, int head, int segment) const {
    return slabs[static_cast<std::size_t>(2 * segment + head)].data() +
           kernels::slab_checksum_offset(shape, layer, 0);
  }

  kernels::KvShape shape;
  int num_segments;
  std::vector<std::vector<std::byte>> slabs;
};

// Fills those of an outsized sequence that are no hits.
void fill(Reservation& kv, const Slabs& slabs) {
  const Segments segments{kv.hit_segments, slabs.num_segments};
  for (int layer = 0; layer < slabs.shape.num_layers; ++layer) {
    ASSERT_TRUE(kv.outsized->make_room(layer, segments));
    for (int i = 2 * segments.first; i < 2 * segments.end; ++i) {
      const int head = i % 2;
      const int segment = i / 2;
      const auto run = static_cast<std::size_t>((layer * 2 + head) * kv.num_segments + segment);
      std::memcpy(kv.outsized->runs()[run], slabs.run(layer, head, segment),
                  slabs.shape.run_bytes());
      std::memcpy(kv.outsized->checksums() + run * kSegmentBlocks,
                  slabs.checksums(layer, head, segment), kSegmentBlocks * sizeof(std::uint64_t));
    }
    kv.outsized->fill(layer, segments);
  }
}

// Whether a layer of them is there again.
testing::AssertionResult holds(Reservation& kv, const Slabs& slabs, int layer) {
  const Status there = kv.outsized->wait(layer, Segments{0, slabs.num_segments});
  if (!there) return testing::AssertionFailure() << there.error().message;
  for (int i = 0; i < 2 * slabs.num_segments; ++i) {
    const std::byte* run = kv.outsized->runs_of(layer)[i % 2 * kv.num_segments + i / 2];
    if (std::memcmp(run, slabs.run(layer, i % 2, i / 2), slabs.shape.run_bytes()) != 0) {
      return testing::AssertionFailure() << "head " << i % 2 << ", segment " << i / 2;
    }
  }
  kv.outsized->let_go(layer);
  return testing::AssertionSuccess();
}

void publish(KvStore& store, Reservation& kv, std::span<const PrefixKey> keys) {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    kv.outsized->publish(static_cast<int>(i), keys[i]);
  }
  kv.outsized->finish_publishing(std::chrono::seconds(10));
  ASSERT_TRUE(store.publish_written(kv));
}

TEST_F(NvmeStoreTest, WhatRunsFromNvmePublishesAndReuses) {
  const auto begin = [&] {
    server.reset();
    server = std::make_unique<RunningServer>(
        kArenaBytes, NvmeConfig{nvme_folder(), 16 << 20, NvmeReuse::kKeepSlabs});
    return connect();
  };
  const std::vector keys{key_of(1), key_of(2), key_of(3)};
  auto store = begin();
  auto first = store->reserve(SequenceId{100}, keys, kSomeSegments).value();
  EXPECT_EQ(first.hit_segments, 0);
  fill(first, Slabs(keys));
  publish(*store, first, keys);
  ASSERT_TRUE(written(*store, 6));
  EXPECT_TRUE(finds(*store, 1));  // by a sequence that the arena holds, while this one runs
  first.outsized.reset();
  ASSERT_TRUE(store->release(SequenceId{100}));

  store.reset();
  store = begin();  // a restart
  auto second = store->reserve(SequenceId{101}, keys, kSomeSegments).value();
  EXPECT_EQ(second.hit_segments, 3);
  ASSERT_TRUE(store->use(second, 1));  // another rank has less: two slots a head are empty again
  fill(second, Slabs(keys));
  publish(*store, second, keys);
  EXPECT_TRUE(holds(second, Slabs(keys), 2));
  second.outsized.reset();
  ASSERT_TRUE(store->release(SequenceId{101}));
  const StoreStat stat = store->stat().value();
  EXPECT_EQ(stat.nvme.slabs_held, 6);
  EXPECT_EQ(stat.bad_requests + stat.nvme.checksum_failures, 0);

  store.reset();
  server.reset();  // a bit of the second segment's table, or of its header
  for (const bool is_header : {false, true}) {
    const std::size_t slab_bytes = kModel.slab_bytes();
    const std::uint32_t num_slots = NvmeGeometry::fit(16 << 20, slab_bytes).num_slots;
    std::fstream file(nvme_folder() + "/kv-slabs", std::ios::in | std::ios::out | std::ios::binary);
    std::vector<char> header(kSectorBytes);
    for (std::uint32_t slot = 0; slot < num_slots; ++slot) {
      const NvmeGeometry geometry{slab_bytes, num_slots};
      const auto at = geometry.header_offset(SlotIndex{slot});
      file.seekg(static_cast<std::streamoff>(at)).read(header.data(), kSectorBytes);
      if (std::memcmp(header.data() + 56, keys[is_header ? 0 : 1].bytes.data(), 32) != 0) continue;
      const auto table =
          geometry.slab_offset(SlotIndex{slot}) + kModel.slab_shape().slab_payload_bytes();
      file.seekg(static_cast<std::streamoff>(is_header ? at : table)).read(header.data(), 1);
      header[0] = static_cast<char>(header[0] ^ 1);
      file.seekp(static_cast<std::streamoff>(is_header ? at : table)).write(header.data(), 1);
      break;
    }
    file.close();
    store = begin();
    const SequenceId id{is_header ? 103U : 102U};
    EXPECT_EQ(store->reserve(id, keys, kSomeSegments).value().hit_segments, is_header ? 0 : 1);
    ASSERT_TRUE(store->release(id));
    EXPECT_GT(store->stat()->nvme.checksum_failures, 0);
    store.reset();
    server.reset();
  }
}

// A sequence had the prefix's slots, and was gone before it published.
TEST_F(NvmeStoreTest, WhatGaveWayToRunsIsNotFoundAfterARestart) {
  const std::vector keys{key_of(1), key_of(2), key_of(3)};
  const std::vector others{key_of(4), key_of(5), key_of(6)};
  std::unique_ptr<KvStore> store;
  for (const std::uint64_t life : {0, 1, 2}) {
    store.reset();
    server.reset();
    server = std::make_unique<RunningServer>(
        kArenaBytes,
        NvmeConfig{nvme_folder(), NvmeGeometry{kModel.slab_bytes(), 2 * kSomeSegments}.file_bytes(),
                   NvmeReuse::kKeepSlabs});
    store = connect();
    const bool is_other = life == 1;
    auto kv = reserve_slots(*store, SequenceId{life}, is_other ? others : keys, kSomeSegments);
    EXPECT_EQ(kv.hit_segments, 0) << life;
    fill(kv, Slabs(is_other ? others : keys));
    if (!is_other) publish(*store, kv, keys);
  }
}

// What is published meanwhile waits for a slot, and is copied once.
TEST_F(NvmeStoreTest, WhatFindsNoSlotIsWrittenWhenThereIsOne) {
  server = std::make_unique<RunningServer>(
      kArenaBytes,
      NvmeConfig{nvme_folder(), NvmeGeometry{kModel.slab_bytes(), 2 * kSomeSegments}.file_bytes(),
                 NvmeReuse::kStartAfresh});
  const auto store = connect();
  ASSERT_TRUE(store->reserve(SequenceId{100}, {}, kSomeSegments));  // has all slots
  write(*store, 1);
  EXPECT_EQ(store->stat()->nvme.slabs_written, 0);
  ASSERT_TRUE(store->release(SequenceId{100}));
  EXPECT_TRUE(written(*store, 2));
  EXPECT_EQ(store->stat()->nvme.dropped, 0);
}

// The file is full when eight prompts are beside the prefix.
TEST_F(NvmeStoreTest, WhatRanFromNvmeGivesWayFromItsEnd) {
  const std::vector keys{key_of(1), key_of(2), key_of(3)};
  for (const bool restarts : {false, true}) {
    std::unique_ptr<KvStore> store;
    const auto start = [&](NvmeReuse reuse) {
      store.reset();
      server.reset();
      const NvmeGeometry geometry{kModel.slab_bytes(), 2 * kSomeSegments};
      server = std::make_unique<RunningServer>(
          kArenaBytes, NvmeConfig{nvme_folder(), geometry.file_bytes(), reuse});
      store = connect();
    };
    start(NvmeReuse::kKeepSlabs);
    auto first = store->reserve(SequenceId{100}, keys, kSomeSegments).value();
    EXPECT_EQ(first.hit_segments, 0);
    fill(first, Slabs(keys));
    publish(*store, first, keys);
    ASSERT_TRUE(written(*store, 6));
    first.outsized.reset();
    ASSERT_TRUE(store->release(SequenceId{100}));
    if (restarts) start(NvmeReuse::kKeepSlabs);
    const auto before = store->stat()->nvme.slabs_written;
    for (std::uint32_t i = 0; i < 9; ++i) write(*store, 11 + i);
    ASSERT_TRUE(written(*store, before + 18));
    EXPECT_EQ(reserve_slots(*store, SequenceId{101}, keys, kSomeSegments).hit_segments, 2);
    start(NvmeReuse::kStartAfresh);  // and its end leaves no file
  }
}

// The rank opens what the store has sealed, and the store what the rank has.
TEST_F(NvmeStoreTest, WhatRunsFromAnEncryptedNvmePublishesAndReuses) {
  const auto cipher = KvCipher::random();
  std::unique_ptr<KvStore> store;
  const auto end = [&] {
    store.reset();
    server.reset();
  };
  const auto begin = [&](const std::shared_ptr<const KvCipher>& key) {
    end();
    server = std::make_unique<RunningServer>(
        kArenaBytes, NvmeConfig{nvme_folder(), 16 << 20, NvmeReuse::kKeepSlabs, key});
    store = connect();
  };
  const std::vector keys{key_of(1), key_of(2), key_of(3)};
  const Slabs slabs(keys);
  const auto all_hold = [&](Reservation& kv) {
    for (int layer = 0; layer < kModel.num_layers; ++layer) {
      EXPECT_TRUE(holds(kv, slabs, layer)) << layer;
    }
  };
  begin(cipher);
  write(*store, 1);
  ASSERT_TRUE(written(*store, 2));
  auto first = store->reserve(SequenceId{100}, keys, kSomeSegments).value();
  EXPECT_EQ(first.hit_segments, 1);
  fill(first, slabs);
  publish(*store, first, keys);
  ASSERT_TRUE(written(*store, 6));
  all_hold(first);
  EXPECT_TRUE(finds(*store, 2) && finds(*store, 3));  // by sequences that the arena holds
  EXPECT_EQ(store->stat()->nvme.slabs_read, 4);
  first.outsized.reset();
  ASSERT_TRUE(store->release(SequenceId{100}));

  begin(cipher);  // a restart
  auto second = store->reserve(SequenceId{101}, keys, kSomeSegments).value();
  EXPECT_EQ(second.hit_segments, 3);
  all_hold(second);
  second.outsized.reset();
  EXPECT_EQ(store->stat()->bad_requests + store->stat()->nvme.checksum_failures, 0);

  begin(KvCipher::random());
  EXPECT_FALSE(store->reserve(SequenceId{102}, keys, kSomeSegments)) << "there is no tier";
  EXPECT_FALSE(finds(*store, 1));

  // A bit of each slab's second run is seen when it comes, one of its seals before that.
  const NvmeGeometry geometry{
      slot_bytes(kModel.slab_shape(), true),
      NvmeGeometry::fit(16 << 20, slot_bytes(kModel.slab_shape(), true)).num_slots};
  const auto flip = [&](std::size_t place) {
    std::fstream file(nvme_folder() + "/kv-slabs", std::ios::in | std::ios::out | std::ios::binary);
    for (std::uint32_t slot = 0; slot < geometry.num_slots; ++slot) {
      const auto at = static_cast<std::streamoff>(geometry.slab_offset(SlotIndex{slot}) + place);
      const auto byte = static_cast<char>(file.seekg(at).get() ^ 1);
      file.seekp(at).put(byte);
    }
  };
  const std::size_t run = kModel.slab_shape().run_bytes();
  for (const std::size_t place : {run + 5, kModel.slab_bytes() + 41}) {
    end();
    flip(place);
    begin(cipher);
    const bool is_run = place == run + 5;
    auto third = store->reserve(SequenceId{103}, keys, kSomeSegments).value();
    EXPECT_LE(third.hit_segments, is_run ? 3 : 0);  // the idle tier may have looked before
    EXPECT_EQ(third.outsized->wait(1, Segments{0, third.hit_segments}).has_value(),
              third.hit_segments == 0);
    ASSERT_TRUE(store->publish_written(third));
    third.outsized.reset();
    ASSERT_TRUE(store->release(SequenceId{103}));
    EXPECT_GT(store->stat()->nvme.checksum_failures, 0);
    EXPECT_LT(store->reserve(SequenceId{104}, keys, kSomeSegments).value().hit_segments, 3);
    end();
    flip(place);  // back again
  }
}

TEST_F(NvmeStoreTest, TheKeyIsOfAnEncryptedFileAndForRanks) {
  for (const bool is_sealed : {false, true}) {
    server = std::make_unique<RunningServer>(
        kArenaBytes, NvmeConfig{nvme_folder(), 16 << 20, NvmeReuse::kStartAfresh,
                                is_sealed ? KvCipher::random() : nullptr});
    Hello hello;
    hello.owner = {0, 0, Epoch{1}, 0, 2};
    hello.model = kModel;
    Connection stranger(connect_to(server->socket(), std::chrono::seconds(20)).value_or_throw());
    EXPECT_FALSE(stranger.ask(FindKey{})) << "it has not said hello";
    Connection rank(connect_to(server->socket(), std::chrono::seconds(20)).value_or_throw());
    ASSERT_TRUE(rank.ask(hello));
    FileDescriptor pipe;
    const auto key = rank.ask_for<FileKey>(FindKey{}, &pipe);
    EXPECT_EQ(key.has_value(), is_sealed);
    EXPECT_EQ(KvCipher::from_pipe(pipe.get(), CipherKind::kAes256Gcm).has_value(), is_sealed);
    server.reset();
  }
}

// Twelve layers, so that 15 slabs a head are few, and 20 segments must have five.
class FewSlabsTest : public NvmeStoreTest {
 protected:
  void SetUp() override {
    NvmeStoreTest::SetUp();
    server = std::make_unique<RunningServer>(
        40 << 20, NvmeConfig{nvme_folder(), 128 << 20, NvmeReuse::kStartAfresh});
    StoreClientConfig config = test_client(server->socket(), 0);
    config.shape.num_layers = 12;
    store = KvStore::connect(config, *device).value_or_throw();
    ASSERT_TRUE(ready(*store));
    ASSERT_EQ(slabs_per_head(*store), 15);
  }
  std::unique_ptr<KvStore> store;
};

TEST_F(FewSlabsTest, ASequenceLargerThanTheArenaLeavesWhatAnotherOneNeeds) {
  const auto reserve_as = [&](std::uint64_t id) { return store->reserve(SequenceId{id}, {}, 20); };
  const auto free = [&] { return store->stat()->slabs_free; };

  ASSERT_TRUE(reserve_as(1));
  EXPECT_EQ(free(), 5);  // three quarters would leave four
  ASSERT_TRUE(reserve_as(2));
  EXPECT_EQ(free(), 0);
  const auto third = reserve_as(3);
  ASSERT_FALSE(third);
  EXPECT_EQ(third.error().code, ErrorCode::kExhausted);
  ASSERT_TRUE(store->release(SequenceId{1}));
  ASSERT_TRUE(reserve_as(3));
  EXPECT_EQ(free(), 5);
  ASSERT_TRUE(reserve_as(4));
}

// Others hold some slabs; 20 segments are given ten at most.
TEST_F(FewSlabsTest, ASequenceLargerThanTheArenaRunsInWhatOthersLeave) {
  for (const auto& [held, granted] : {std::pair{4, 10}, {6, 9}, {10, 5}}) {
    ASSERT_TRUE(store->reserve(SequenceId{1}, {}, held));
    ASSERT_TRUE(store->reserve(SequenceId{2}, {}, 20)) << held;
    EXPECT_EQ(store->stat()->slabs_free, 15 - held - granted) << held;
    ASSERT_TRUE(store->release(SequenceId{2}));
    ASSERT_TRUE(store->release(SequenceId{1}));
  }
  ASSERT_TRUE(store->reserve(SequenceId{1}, {}, 11));
  const auto refused = store->reserve(SequenceId{2}, {}, 20);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kExhausted);
}

const ModelIdentity kDeep{"test-model", 3, 12, 64, kernels::DataType::kFp16};

// Rank 0 has heads 0 and 1, rank 1 has 1 and 2. Of twelve layers, 24 segments must have five slabs
// a head: ten of head 1, and 96 slots.
class SharedHeadTest : public NvmeStoreTest {
 protected:
  static constexpr int kSegments = 24;

  void start(int slabs_a_head, int num_slots) {
    server.reset();
    server = std::make_unique<RunningServer>(
        ArenaLayout{3, kDeep.slab_bytes(), static_cast<std::uint32_t>(slabs_a_head)}.arena_bytes(),
        NvmeConfig{
            nvme_folder(),
            NvmeGeometry{kDeep.slab_bytes(), static_cast<std::uint32_t>(num_slots)}.file_bytes(),
            NvmeReuse::kStartAfresh});
  }
  std::unique_ptr<KvStore> connect(int rank) {
    StoreClientConfig config = test_client(server->socket(), rank);
    config.shape.num_layers = kDeep.num_layers;
    auto store = KvStore::connect(config, *device).value_or_throw();
    EXPECT_TRUE(ready(*store));
    return store;
  }
  static Result<Reservation> reserve(KvStore& store, std::uint64_t id,
                                     std::span<const PrefixKey> keys = {}) {
    return store.reserve(SequenceId{id}, keys, kSegments);
  }
  static std::vector<PrefixKey> keys_of(std::uint32_t prompt, int count) {
    std::vector<PrefixKey> keys;
    for (int i = 0; i < count; ++i) keys.push_back(key_of(100 * prompt + static_cast<unsigned>(i)));
    return keys;
  }
};

TEST_F(SharedHeadTest, EachRankHasFramesAndSlotsOfItsOwn) {
  start(15, 96);
  const auto low = connect(0);
  auto high = connect(1);
  const auto free = [&] { return low->stat()->slabs_free; };
  // What a rank holds of head 1 is not what the other one does.
  const Slabs lows(keys_of(1, kSegments), kDeep, 0);
  const Slabs highs(keys_of(2, kSegments), kDeep, 1);
  for (const std::uint64_t id : {1, 2}) {  // the second needs all that the first one had
    auto of_low = reserve(*low, id).value();
    EXPECT_EQ(free(), 10);
    auto of_high = reserve(*high, id).value();
    EXPECT_EQ(free(), 5);
    fill(of_low, lows);
    fill(of_high, highs);
    for (const int layer : {0, 5, 11}) {
      EXPECT_TRUE(holds(of_low, lows, layer)) << layer;
      EXPECT_TRUE(holds(of_high, highs, layer)) << layer;
    }
    of_high.outsized.reset();
    of_low.outsized.reset();
    ASSERT_TRUE(low->release(SequenceId{id}));
    EXPECT_TRUE(eventually(*high, [](const StoreStat& stat) { return stat.slabs_free == 10; }));
    if (id == 1) {
      ASSERT_TRUE(high->release(SequenceId{id}));
    } else {
      high.reset();  // as when it dies
    }
    EXPECT_TRUE(eventually(*low, [](const StoreStat& stat) { return stat.slabs_free == 15; }));
  }
  EXPECT_EQ(low->stat()->bad_requests, 0);
}

TEST_F(SharedHeadTest, ASecondSequenceIsLeftWhatItsRanksNeed) {
  start(23, 192);
  const auto low = connect(0);
  const auto high = connect(1);
  const auto left_by = [&](KvStore& store, std::uint64_t id) {
    EXPECT_TRUE(reserve(store, id));
    return store.stat()->slabs_free;
  };
  EXPECT_EQ(left_by(*low, 1), 17);
  EXPECT_EQ(left_by(*high, 1), 11);  // three quarters would leave seven
  EXPECT_EQ(left_by(*high, 2), 6);
  EXPECT_EQ(left_by(*low, 2), 1);
}

// The second rank of a sequence is given as much as the first: what that has is the sequence's.
TEST_F(SharedHeadTest, RanksShareWhatOthersLeave) {
  start(23, 192);
  const auto low = connect(0);
  const auto high = connect(1);
  ASSERT_TRUE(low->reserve(SequenceId{9}, {}, 12));  // leaves eleven: five for each, of head 1
  ASSERT_TRUE(reserve(*low, 1));
  EXPECT_EQ(low->stat()->slabs_free, 6);
  ASSERT_TRUE(reserve(*high, 1));
  EXPECT_EQ(low->stat()->slabs_free, 1);
}

// Both publish, as no rank of these writes all heads: of head 1 the first slab stays.
TEST_F(SharedHeadTest, APrefixServesAllWhoHaveItsHeads) {
  start(15, 120);
  const auto low = connect(0);
  const auto high = connect(1);
  const auto keys = keys_of(1, 3);
  const Slabs lows(keys, kDeep, 0);
  const Slabs highs(keys, kDeep, 1);
  for (const std::uint64_t id : {1, 2}) {
    auto of_low = reserve(*low, id, keys).value();
    auto of_high = reserve(*high, id, keys).value();
    EXPECT_EQ(of_low.hit_segments, id == 1 ? 0 : 3);
    EXPECT_EQ(of_high.hit_segments, id == 1 ? 0 : 3);
    ASSERT_TRUE(low->use(of_low, id == 1 ? 0 : 2));
    ASSERT_TRUE(high->use(of_high, id == 1 ? 0 : 2));
    fill(of_low, lows);
    fill(of_high, highs);
    publish(*low, of_low, keys);
    publish(*high, of_high, keys);
    for (const int layer : {0, 5, 11}) {
      EXPECT_TRUE(holds(of_low, lows, layer)) << layer;
      EXPECT_TRUE(holds(of_high, highs, layer)) << layer;
    }
    ASSERT_TRUE(written(*low, 9));  // three heads
    of_low.outsized.reset();
    of_high.outsized.reset();
    ASSERT_TRUE(low->release(SequenceId{id}));
    ASSERT_TRUE(high->release(SequenceId{id}));
  }
  const StoreStat stat = low->stat().value();
  EXPECT_EQ(stat.nvme.slabs_held, 9);
  EXPECT_EQ(stat.bad_requests + stat.nvme.checksum_failures, 0);
}

TEST_F(SharedHeadTest, WhatAllRanksNeedIsWhatMustFit) {
  for (const auto& [slabs, slots] : {std::pair{7, 96}, {10, 95}}) {
    start(slabs, slots);
    const auto low = connect(0);
    const auto high = connect(1);
    const auto kv = reserve(*low, 1);
    ASSERT_FALSE(kv);
    EXPECT_EQ(kv.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(kv.error().message.find("can never fit: they take 10 slabs"), std::string::npos)
        << kv.error().message;
    EXPECT_NE(kv.error().message.find("96 slots"), std::string::npos) << kv.error().message;
  }
  start(10, 96);
  const auto low = connect(0);
  const auto high = connect(1);
  EXPECT_TRUE(reserve(*low, 1));
  EXPECT_TRUE(reserve(*high, 1));
}

// Pieces are 56 slabs of each head here, and memory is there for the first ones.
TEST_F(NvmeStoreTest, WhatIsLargerThanTheArenaHasBecomeRunsFromNvme) {
  const std::vector keys{key_of(1), key_of(2)};
  const Slabs slabs(keys, kDeep);
  const auto first_pieces = [](std::byte*, std::size_t bytes) {
    errno = ENOMEM;
    return bytes == 56 * kDeep.slab_bytes();
  };
  for (const auto& cipher : {std::shared_ptr<const KvCipher>(), KvCipher::random()}) {
    server = std::make_unique<RunningServer>(
        ArenaLayout{3, kDeep.slab_bytes(), 100}.arena_bytes(),
        NvmeConfig{nvme_folder(), 256 << 20, NvmeReuse::kStartAfresh, cipher}, first_pieces);
    StoreClientConfig config = test_client(server->socket(), 0);
    config.shape.num_layers = kDeep.num_layers;
    const auto store = KvStore::connect(config, *device).value_or_throw();
    ASSERT_TRUE(eventually(*store, [](const StoreStat& stat) { return stat.slabs_total == 56; }));

    auto kv = store->reserve(SequenceId{1}, keys, 57);
    ASSERT_TRUE(kv) << kv.error().message;
    ASSERT_NE(kv->outsized, nullptr);
    fill(*kv, slabs);
    publish(*store, *kv, keys);
    EXPECT_TRUE(written(*store, 4));
    EXPECT_TRUE(holds(*kv, slabs, 11));
    kv->outsized.reset();
    ASSERT_TRUE(store->release(SequenceId{1}));
    EXPECT_EQ(store->reserve(SequenceId{2}, {}, 56).value().outsized, nullptr);
    server.reset();
  }
}

TEST_F(NvmeStoreTest, WhatNeverFitsIsRefusedWithTheTierToo) {
  start();
  const auto store = connect();
  for (const int segments : {200, 2000}) {
    const auto kv = store->reserve(SequenceId{1}, {}, segments);
    ASSERT_FALSE(kv);
    EXPECT_EQ(kv.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(kv.error().message.find("can never fit"), std::string::npos) << kv.error().message;
  }
}

TEST_F(NvmeStoreTest, AnArenaBesideTheTiersBuffersMustFitTheMachine) {
  server =
      std::make_unique<RunningServer>(std::size_t{1} << 46, NvmeConfig{nvme_folder(), 64 << 20});
  const auto store = KvStore::connect(test_client(server->socket(), 0), *device);
  ASSERT_FALSE(store);
  EXPECT_EQ(store.error().code, ErrorCode::kConfig);
  const std::string buffers = std::to_string(NvmeTier::memory_bytes(kModel));
  EXPECT_NE(store.error().message.find("beside " + buffers + " of NVMe's"), std::string::npos)
      << store.error().message;
}

// It may fit once the disk is there again.
TEST_F(NvmeStoreTest, WhatIsLargerThanTheArenaWaitsForATierThatCanNotBeOpened) {
  server = std::make_unique<RunningServer>(kArenaBytes, NvmeConfig{nvme_folder(), kSectorBytes});
  const auto store = connect();
  ASSERT_EQ(store->stat()->nvme.state, NvmeState::kOffline);
  const auto kv = store->reserve(SequenceId{1}, {}, slabs_per_head(*store) + 1);
  ASSERT_FALSE(kv);
  EXPECT_EQ(kv.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(kv.error().message.find("NVMe tier is offline"), std::string::npos);
  EXPECT_TRUE(store->reserve(SequenceId{2}, {}, 1)) << "others run";
}

// A disk that hangs takes seconds to fail: the first rank of a group waits for that, and no other.
TEST_F(NvmeStoreTest, ATierThatCanNotBeOpenedIsNotTriedAgainAtOnce) {
  server = std::make_unique<RunningServer>(
      kArenaBytes, NvmeConfig{nvme_folder(), 64 << 20, NvmeReuse::kKeepSlabs, KvCipher::random()});
  connect();
  server.reset();
  start();  // without the key
  const auto first = connect(0);
  ASSERT_EQ(first->stat()->nvme.state, NvmeState::kOffline);
  std::filesystem::resize_file(nvme_folder() + "/kv-slabs", 0);  // it would open now
  const auto second = connect(1);
  EXPECT_EQ(second->stat()->nvme.state, NvmeState::kOffline);
}

TEST_F(NvmeStoreTest, RanksThatShareAHeadBothFindIt) {
  start();
  {
    const auto low = connect(0);
    const auto high = connect(1);
    const PrefixKey key = key_of(1);
    for (KvStore* rank : {low.get(), high.get()}) {
      const auto kv = rank->reserve(SequenceId{1}, std::span(&key, 1), 1);
      ASSERT_TRUE(kv);
      const int first_head = rank == low.get() ? 0 : 1;
      for (int i = 0; i < 2; ++i) {
        const auto slab = test_slab({first_head + i, key}, kModel);
        std::memcpy(kv->slabs[static_cast<std::size_t>(i)], slab.data(), slab.size());
      }
    }
    ASSERT_TRUE(low->commit(SequenceId{1}, 0, key) && high->commit(SequenceId{1}, 0, key));
    ASSERT_TRUE(written(*low, 3));
  }
  server.reset();
  start();
  const auto low = connect(0);
  const auto high = connect(1);
  const PrefixKey key = key_of(1);
  for (KvStore* rank : {low.get(), high.get()}) {
    const auto first = rank->reserve(SequenceId{1}, std::span(&key, 1), 1);
    ASSERT_FALSE(first) << "nobody waits for a disk";
    EXPECT_EQ(first.error().code, ErrorCode::kPending);
  }
  ASSERT_TRUE(eventually(*low, [](const StoreStat& stat) { return stat.nvme.slabs_read == 3; }));
  const auto of_low = low->reserve(SequenceId{2}, std::span(&key, 1), 1);
  const auto of_high = high->reserve(SequenceId{2}, std::span(&key, 1), 1);
  ASSERT_TRUE(of_low && of_high);
  EXPECT_EQ(of_low->hit_segments, 1);
  EXPECT_EQ(of_high->hit_segments, 1);
  EXPECT_EQ(low->stat()->nvme.slabs_read, 3) << "the shared head came once";
}

TEST_F(NvmeStoreTest, APeerThatLeavesWhileItWaitsHarmsNobody) {
  start();
  write(*connect(), 1);
  server.reset();
  start();
  const auto good = connect(1);
  Hello hello;
  hello.owner = {0, 0, Epoch{1}, 0, 2};
  hello.model = kModel;
  for (const bool says_goodbye : {true, false}) {
    const auto peer = connect_to(server->socket(), std::chrono::seconds(20)).value_or_throw();
    ASSERT_TRUE(send_message(peer.get(), encode(Request{hello})));
    ASSERT_TRUE(receive_message(peer.get(), kMaxMessageBytes));
    ASSERT_TRUE(send_message(peer.get(), encode(Request{Reserve{SequenceId{9}, 1, {key_of(1)}}})));
    if (!says_goodbye) continue;
    ASSERT_TRUE(receive_message(peer.get(), kMaxMessageBytes));
    ASSERT_TRUE(send_message(peer.get(), encode(Request{Goodbye{}})));
  }
  EXPECT_TRUE(eventually(*good, [](const StoreStat& stat) { return stat.nvme.slabs_read == 2; }));
  EXPECT_TRUE(good->reserve(SequenceId{1}, {}, 1));
}

TEST_F(NvmeStoreTest, TheFileIsOurs) {
  std::filesystem::create_directory(nvme_folder());
  chmod(nvme_folder().c_str(), 0700);
  const std::string file = nvme_folder() + "/kv-slabs";
  std::filesystem::create_symlink("/dev/null", file);
  EXPECT_THROW(NvmeFile{nvme_folder()}, Exception) << "a symbolic link";
  std::filesystem::remove(file);
  { std::ofstream(file) << "x"; }
  chmod(file.c_str(), 0644);
  EXPECT_THROW(NvmeFile{nvme_folder()}, Exception) << "others may read it";
  chmod(file.c_str(), 0600);
  std::filesystem::create_hard_link(file, nvme_folder() + "/second");
  EXPECT_THROW(NvmeFile{nvme_folder()}, Exception) << "a second name";
  std::filesystem::remove(nvme_folder() + "/second");
  const NvmeFile first(nvme_folder());
  EXPECT_THROW(NvmeFile{nvme_folder()}, Exception) << "another store has it";
  chmod(nvme_folder().c_str(), 0755);
}

TEST_F(NvmeStoreTest, AFileThatItsLastStoreRemovesIsMadeAnew) {
  auto last = std::make_unique<NvmeFile>(nvme_folder());
  const std::jthread ends([&last] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    last->remove();
    last.reset();
  });
  const NvmeFile made(nvme_folder());
  EXPECT_TRUE(std::filesystem::exists(nvme_folder() + "/kv-slabs"));
}

// A file system of its own, which is full before the tier is.
class TinyFileSystem {
 public:
  explicit TinyFileSystem(std::string path) : path_(std::move(path)) {
    std::filesystem::create_directory(path_);
    is_mounted_ = mount("tmpfs", path_.c_str(), "tmpfs", 0, "size=4m,mode=0700") == 0;
  }
  ~TinyFileSystem() {
    if (is_mounted_) umount2(path_.c_str(), MNT_DETACH);
  }
  TinyFileSystem(const TinyFileSystem&) = delete;
  TinyFileSystem& operator=(const TinyFileSystem&) = delete;
  bool is_mounted() const { return is_mounted_; }
  void grow() const { mount("tmpfs", path_.c_str(), "tmpfs", MS_REMOUNT, "size=64m,mode=0700"); }

 private:
  std::string path_;
  bool is_mounted_ = false;
};

TEST_F(NvmeStoreTest, AFullFileSystemCostsNoRequest) {
  const TinyFileSystem disk(nvme_folder());
  if (!disk.is_mounted()) GTEST_SKIP() << "only root can mount a tmpfs";
  start();
  const auto store = connect();
  std::uint32_t prompt = 0;
  const auto state_is = [&](NvmeState state) {
    write(*store, prompt++);
    return store->stat()->nvme.state == state;
  };
  for (int i = 0; i < 100 && !state_is(NvmeState::kReadOnly); ++i) {
  }
  EXPECT_EQ(store->stat()->nvme.state, NvmeState::kReadOnly);
  EXPECT_TRUE(finds(*store, 0)) << "reads go on";
  disk.grow();
  for (int i = 0; i < 500 && !state_is(NvmeState::kOnline); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(store->stat()->nvme.state, NvmeState::kOnline);
  EXPECT_EQ(store->stat()->nvme.io_errors, 0);
}

}  // namespace
}  // namespace foretoken::kvstore
