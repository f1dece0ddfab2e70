// The ops that move KV, on the CUDA device against the CPU device: equal bytes in scratch, slots
// and arena, equal tables, equal counts of what did not pass its check.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "tests/kernels/cuda/device_sequence.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261123;
constexpr int kMaxBlocks = 70;
constexpr int kNumSlots = 30;
constexpr int kScratchTokens = kMaxBlocks * kBlockTokens;

// One device with a sequence and prefill scratch on it.
struct Side {
  Side(DeviceUnderTest& device, const KvShape& shape_of)
      : on(device),
        shape(shape_of),
        sequence(device, shape, kNumSlots, kMaxBlocks),
        slabs(sequence.slab_addresses(shape)),
        k(device, random_bytes(scratch_bytes(), 2)),
        v(device, random_bytes(scratch_bytes(), 3)) {}

  std::size_t scratch_bytes() const {
    return static_cast<std::size_t>(shape.num_kv_heads) * kScratchTokens * shape.block_bytes() /
           (2 * kBlockTokens);
  }
  void pack(int layer, int first_block, int num_blocks, int num_tokens, bool to_arena = true) {
    on.run(
        &Device::pack_blocks,
        PackBlocksArgs{k.data(), v.data(), kScratchTokens, shape.num_kv_heads, shape.head_dim,
                       layer, first_block, num_blocks, num_tokens, to_arena, sequence.view.data(),
                       knows_slabs ? slabs.data() : nullptr, sequence.num_segments});
  }
  void unpack(int layer, int first_block, int num_blocks) {
    on.run(&Device::unpack_blocks,
           UnpackBlocksArgs{k.data(), v.data(), kScratchTokens, shape.num_kv_heads, shape.head_dim,
                            layer, first_block, num_blocks, sequence.view.data()});
  }
  void pack_all_layers() {
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      pack(layer, 0, kMaxBlocks, kScratchTokens);
    }
  }

  DeviceUnderTest& on;
  KvShape shape;
  DeviceSequence sequence;
  std::vector<std::byte*> slabs;
  bool knows_slabs = false;
  DeviceArray<std::byte> k;
  DeviceArray<std::byte> v;
};

bool equal(std::span<const std::byte> a, std::span<const std::byte> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

void expect_equal(Side& cuda, Side& cpu) {
  EXPECT_TRUE(equal(cuda.sequence.arena.host(), cpu.sequence.arena.host()));
  EXPECT_TRUE(cuda.sequence.slots.get() == cpu.sequence.slots.get());
  EXPECT_TRUE(cuda.k.get() == cpu.k.get());
  EXPECT_TRUE(cuda.v.get() == cpu.v.get());
  EXPECT_EQ(cuda.sequence.mismatches.get(), cpu.sequence.mismatches.get());
  cuda.sequence.download();
  cpu.sequence.download();
  EXPECT_EQ(cuda.sequence.block_to_slot, cpu.sequence.block_to_slot);
  EXPECT_EQ(cuda.sequence.slot_to_block, cpu.sequence.slot_to_block);
}

class KvBlocks : public CudaTest, public testing::WithParamInterface<KvShape> {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    pair = std::make_unique<Pair>();
    cuda = std::make_unique<Side>(pair->cuda, GetParam());
    cpu = std::make_unique<Side>(pair->cpu, GetParam());
  }
  template <typename Change>
  void both(Change change) {
    change(*cuda);
    change(*cpu);
  }

  std::unique_ptr<Pair> pair;
  std::unique_ptr<Side> cuda;
  std::unique_ptr<Side> cpu;
};

INSTANTIATE_TEST_SUITE_P(Shapes, KvBlocks,
                         testing::Values(KvShape{1, 1, 8, DataType::kFp16},
                                         KvShape{2, 3, 64, DataType::kFp16},
                                         KvShape{2, 8, 128, DataType::kBf16},
                                         KvShape{3, 1, 96, DataType::kBf16}));

TEST_P(KvBlocks, PacksAsTheCpu) {
  both([](Side& side) {
    for (int slot = 0; slot < kNumSlots; ++slot) side.sequence.place(0, 0, 2 * slot, slot);
    side.sequence.upload();
  });
  // Blocks and tokens: none, one, a part of a block, blocks behind the last token, and all.
  for (const auto& [first, blocks, tokens] : {std::array{0, 0, 0},
                                              {0, 1, 1},
                                              {0, 1, 16},
                                              {2, 18, 300},
                                              {10, 20, 200},
                                              {0, kMaxBlocks, kScratchTokens}}) {
    SCOPED_TRACE(testing::Message() << first << " + " << blocks << " of " << tokens);
    for (const bool to_arena : {false, true}) {
      both([=](Side& side) { side.pack(0, first, blocks, tokens, to_arena); });
      expect_equal(*cuda, *cpu);
    }
    both([=](Side& side) {  // by the copy engines
      side.knows_slabs = true;
      side.pack(0, first, blocks, tokens);
      side.knows_slabs = false;
    });
    expect_equal(*cuda, *cpu);
  }
}

// Runs and checksums in pinned memory, as the host changes them between steps.
struct Runs {
  explicit Runs(Side& side) : device(*side.on.device) {
    SequenceKv& kv = side.sequence.kv;
    const std::size_t count = entries_of(side.shape, side.sequence.num_segments);
    runs = static_cast<std::byte**>(device.allocate_pinned(count * sizeof(std::byte*)));
    checksums = static_cast<std::uint64_t*>(
        device.allocate_pinned(count * kSegmentBlocks * sizeof(std::uint64_t)));
    for (std::size_t i = 0; i < count; ++i) {
      runs[i] = side.sequence.arena.address() + (count - 1 - i) * side.shape.run_bytes();
    }
    kv.slabs = nullptr;
    kv.runs = runs;
    kv.checksums = checksums;
    side.sequence.view.set({kv});
  }
  ~Runs() {
    device.release_pinned(checksums);
    device.release_pinned(runs);
  }
  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;

  Device& device;
  std::byte** runs = nullptr;
  std::uint64_t* checksums = nullptr;
};

TEST_P(KvBlocks, PacksAndGathersRunsOfAnOutsizedSequence) {
  Runs on_cuda(*cuda);
  Runs on_cpu(*cpu);
  const auto pack = [](Side& side, const Runs& runs, bool host_knows) {
    for (int layer = 0; layer < side.shape.num_layers; ++layer) {
      side.on.run(
          &Device::pack_blocks,
          PackBlocksArgs{.k = side.k.data(),
                         .v = side.v.data(),
                         .scratch_tokens = kScratchTokens,
                         .num_kv_heads = side.shape.num_kv_heads,
                         .head_dim = side.shape.head_dim,
                         .layer = layer,
                         .first_block = 0,
                         .num_blocks = kMaxBlocks,
                         .num_tokens = kScratchTokens - 5,
                         .to_arena = true,
                         .sequence = side.sequence.view.data(),
                         .max_segments = side.sequence.num_segments,
                         .host_runs = host_knows ? runs.runs + layer * side.shape.num_kv_heads *
                                                                   side.sequence.num_segments
                                                 : nullptr});
    }
  };
  const std::size_t sums = entries_of(GetParam(), cuda->sequence.num_segments) * kSegmentBlocks;
  for (const bool host_knows : {false, true}) {
    for (Runs* runs : {&on_cuda, &on_cpu}) std::fill_n(runs->checksums, sums, 0);
    pack(*cuda, on_cuda, host_knows);
    pack(*cpu, on_cpu, false);
    expect_equal(*cuda, *cpu);
    EXPECT_TRUE(std::equal(on_cuda.checksums, on_cuda.checksums + sums, on_cpu.checksums));
  }
  // Of head 0, layer 0: block 1 is there; block 20 late, its run on NVMe; block 40 damaged.
  const auto gather = [](Side& side, Runs& runs) {
    DeviceFetches fetches(side.on, side.shape, 3);
    std::vector<FetchEntry> entries(entries_of(side.shape, 3));
    std::ranges::copy(std::array<FetchEntry, 3>{{{1, 4}, {20, 5}, {40, 6}}}, entries.begin());
    std::vector<std::int32_t> counts(entries_of(side.shape, 1));
    counts[0] = 3;
    for (const auto& [block, slot] : std::span(entries).first(3)) {
      side.sequence.place(0, 0, block, slot);
    }
    side.sequence.upload();
    fetches.entries.set(entries);
    fetches.counts.set(counts);
    runs.runs[20 / kSegmentBlocks] = nullptr;
    runs.checksums[40] ^= 1;
    side.on.run(&Device::gather, GatherArgs{side.sequence.view.data(), fetches.view.data(), 1, 0});
  };
  gather(*cuda, on_cuda);
  gather(*cpu, on_cpu);
  expect_equal(*cuda, *cpu);
  EXPECT_EQ(cuda->sequence.mismatches.get()[0], 8U);
  EXPECT_EQ(cuda->sequence.block_to_slot[1], 4);
  EXPECT_EQ(cuda->sequence.block_to_slot[20], kAbsent);
  EXPECT_EQ(cuda->sequence.block_to_slot[40], kAbsent);
}

TEST_P(KvBlocks, UnpacksAsTheCpuAndSeesAFlippedBit) {
  both([](Side& side) {
    side.pack_all_layers();
    side.k.set(random_bytes(side.scratch_bytes(), 8));
    side.v.set(random_bytes(side.scratch_bytes(), 9));
    side.unpack(0, 3, 0);
    side.unpack(0, 3, 41);
  });
  EXPECT_EQ(cuda->sequence.mismatches.get()[0], 7U);
  expect_equal(*cuda, *cpu);
  both([](Side& side) {
    side.sequence.arena_block(0, 0, 9)[77] ^= std::byte{4};
    side.sequence.slab(0, 33)[slab_checksum_offset(side.shape, 0, 33) + 7] ^= std::byte{1};
    side.unpack(0, 0, kMaxBlocks);
  });
  EXPECT_EQ(cuda->sequence.mismatches.get()[0], 9U);
  expect_equal(*cuda, *cpu);
}

// Random lists over every (layer, head), some of them empty, some of blocks with a fault.
TEST_P(KvBlocks, GathersAsTheCpuAndSeesEveryFault) {
  const KvShape shape = GetParam();
  std::mt19937 random(kSeed);
  const int heads = shape.num_layers * shape.num_kv_heads;
  const int layer = shape.num_layers - 1;
  const int heads_before = layer * shape.num_kv_heads;
  std::vector<FetchEntry> entries(entries_of(shape, kNumSlots));
  std::vector<std::int32_t> counts(entries_of(shape, 1));
  std::vector<std::int32_t> first_block;
  for (int head = 0; head < heads; ++head) {
    counts[static_cast<std::size_t>(head)] =
        head == heads_before ? kNumSlots : static_cast<int>(random() % 30);
    first_block.push_back(static_cast<int>(random() % (kMaxBlocks - kNumSlots)));
    for (int i = 0; i < kNumSlots; ++i) {
      entries[static_cast<std::size_t>(head * kNumSlots + i)] = {first_block.back() + i,
                                                                 kNumSlots - 1 - i};
    }
  }
  both([&](Side& side) {
    side.pack_all_layers();
    for (int head = 0; head < heads; ++head) {
      for (int i = 0; i < counts[static_cast<std::size_t>(head)]; ++i) {
        const FetchEntry entry = entries[static_cast<std::size_t>(head * kNumSlots + i)];
        side.sequence.place(head / shape.num_kv_heads, head % shape.num_kv_heads, entry.block,
                            entry.slot);
      }
    }
    side.sequence.upload();
    // Head 0: a bit of its second block, at the end; the last head: one slab is not there.
    side.sequence.arena_block(layer, 0,
                              first_block[static_cast<std::size_t>(heads_before)] +
                                  1)[shape.block_bytes() - 1] ^= std::byte{128};
    side.sequence.remove_slab(shape.num_kv_heads - 1, 20);
    DeviceFetches fetches(side.on, shape, kNumSlots);
    fetches.entries.set(entries);
    fetches.counts.set(counts);
    side.on.run(&Device::gather,
                GatherArgs{side.sequence.view.data(), fetches.view.data(), 1, layer});
  });
  expect_equal(*cuda, *cpu);
  EXPECT_GT(cuda->sequence.mismatches.get()[0], 7U);
}

TEST_P(KvBlocks, AnOpenBlockThatFailsItsCheckStaysAsZeros) {
  const KvShape shape = GetParam();
  both([&](Side& side) {
    side.pack_all_layers();
    side.sequence.length.set({5 * kBlockTokens + 3});
    for (int head = 0; head < shape.num_kv_heads; ++head) side.sequence.place(0, head, 5, 3);
    side.sequence.upload();
    side.sequence.arena_block(0, 0, 5)[77] ^= std::byte{4};
    DeviceFetches fetches(side.on, shape, 1);
    fetches.entries.set(std::vector<FetchEntry>(entries_of(shape, 1), {5, 3}));
    fetches.counts.set(std::vector<std::int32_t>(entries_of(shape, 1), 1));
    side.on.run(&Device::gather, GatherArgs{side.sequence.view.data(), fetches.view.data(), 1, 0});
  });
  EXPECT_EQ(cuda->sequence.mismatches.get()[0], 8U);
  EXPECT_EQ(cuda->sequence.slot(0, 0, 5), 3);
  expect_equal(*cuda, *cpu);
}

// More lists than a CTA has threads.
TEST_P(KvBlocks, GathersManyRows) {
  const KvShape shape = GetParam();
  const int rows = 300;
  const auto run = [&](Side& side) {
    side.pack_all_layers();
    DeviceFetches nothing(side.on, shape, 1);
    DeviceFetches one(side.on, shape, 1);
    one.entries.set(std::vector<FetchEntry>(entries_of(shape, 1), {5, 3}));
    one.counts.set(std::vector<std::int32_t>(entries_of(shape, 1), 1));
    std::vector<FetchList> lists(static_cast<std::size_t>(rows), nothing.list);
    lists.back() = one.list;
    const DeviceArray<SequenceKv> sequences(
        side.on, std::vector<SequenceKv>(static_cast<std::size_t>(rows), side.sequence.kv));
    const DeviceArray<FetchList> fetches(side.on, lists);
    side.on.run(&Device::gather, GatherArgs{sequences.data(), fetches.data(), rows, 0});
    side.on.run(&Device::gather, GatherArgs{sequences.data(), fetches.data(), 0, 0});
  };
  const auto before = cuda->sequence.slots.get();
  both(run);
  EXPECT_FALSE(cuda->sequence.slots.get() == before);
  expect_equal(*cuda, *cpu);
}

// Rows that filled a block and rows that did not, more than a CTA has threads; in one of them the
// block is in no slot.
TEST_P(KvBlocks, WritesThroughAsTheCpu) {
  const KvShape shape = GetParam();
  const auto run = [&](Side& side) {
    DeviceSequence idle(side.on, shape, 4, 8);
    DeviceSequence lost(side.on, shape, 4, 8, 5);
    side.sequence.length.set({48});
    idle.length.set({31});
    lost.length.set({16});
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      for (int head = 0; head < shape.num_kv_heads; ++head) side.sequence.place(layer, head, 2, 7);
    }
    side.sequence.upload();
    std::vector<SequenceKv> rows(300, idle.kv);
    rows[1] = side.sequence.kv;
    rows[299] = lost.kv;
    const DeviceArray<SequenceKv> sequences(side.on, rows);
    side.on.run(&Device::write_through, WriteThroughArgs{sequences.data(), 300, false});
    side.on.run(&Device::write_through, WriteThroughArgs{sequences.data(), 0, true});
    side.on.run(&Device::write_through, WriteThroughArgs{sequences.data(), 300, true});
    std::vector<std::byte> arenas(idle.arena.host().begin(), idle.arena.host().end());
    arenas.insert(arenas.end(), lost.arena.host().begin(), lost.arena.host().end());
    return arenas;
  };
  const auto before = random_bytes(cuda->sequence.arena.host().size(), 2);
  EXPECT_TRUE(equal(cuda->sequence.arena.host(), before));
  EXPECT_TRUE(run(*cuda) == run(*cpu));
  EXPECT_FALSE(equal(cuda->sequence.arena.host(), before));
  expect_equal(*cuda, *cpu);
}

// A head whose slabs another rank writes: an outsized sequence's runs are this rank's own.
TEST_P(KvBlocks, WritesThroughToRunsWhereAnotherRankWritesTheSlabs) {
  const KvShape shape = GetParam();
  const Runs on_cuda(*cuda);
  const Runs on_cpu(*cpu);
  const std::size_t sums = entries_of(shape, cuda->sequence.num_segments) * kSegmentBlocks;
  const auto run = [&](Side& side, const Runs& runs) {
    std::fill_n(runs.checksums, sums, 0);
    DeviceSequence whole(side.on, shape, 4, 8);
    whole.length.set({48});
    side.sequence.length.set({48});
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        side.sequence.place(layer, head, 2, 7);
        whole.place(layer, head, 2, 3);
      }
    }
    side.sequence.upload();
    whole.upload();
    const auto before = std::vector(whole.arena.host().begin(), whole.arena.host().end());
    const DeviceArray<SequenceKv> sequences(side.on, {whole.kv, side.sequence.kv});
    side.on.run(&Device::write_through, WriteThroughArgs{sequences.data(), 2, false});
    EXPECT_TRUE(equal(whole.arena.host(), before));
  };
  const auto before = random_bytes(cuda->sequence.arena.host().size(), 2);
  EXPECT_TRUE(equal(cuda->sequence.arena.host(), before));
  run(*cuda, on_cuda);
  run(*cpu, on_cpu);
  EXPECT_FALSE(equal(cuda->sequence.arena.host(), before));
  EXPECT_TRUE(std::equal(on_cuda.checksums, on_cuda.checksums + sums, on_cpu.checksums));
  expect_equal(*cuda, *cpu);
}

// What a step's graph does: the same launches, with what lies in device memory by then.
TEST_P(KvBlocks, RunsInAGraph) {
  const KvShape shape = GetParam();
  DeviceFetches fetches(cuda->on, shape, 1);
  fetches.entries.set(std::vector<FetchEntry>(entries_of(shape, 1), {2, 3}));
  Device& device = *cuda->on.device;
  Stream& stream = *cuda->on.stream;
  const auto step = [&] {
    device.advance({cuda->sequence.view.data(), 1}, stream);
    device.write_through({cuda->sequence.view.data(), 1, true}, stream);
    device.gather({cuda->sequence.view.data(), fetches.view.data(), 1, 0}, stream);
  };
  cuda->sequence.place(0, 0, 2, 7);
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    for (int head = 0; head < shape.num_kv_heads; ++head) cuda->sequence.place(layer, head, 2, 7);
  }
  cuda->sequence.upload();
  cuda->sequence.length.set({45});
  step();
  stream.synchronize();
  const auto graph = device.record(stream, step);
  graph->launch(stream);
  stream.synchronize();
  EXPECT_EQ(cuda->sequence.length.get()[0], 47);
  fetches.counts.set(std::vector<std::int32_t>(entries_of(shape, 1), 1));
  graph->launch(stream);
  stream.synchronize();
  EXPECT_EQ(cuda->sequence.length.get()[0], 48);
  EXPECT_EQ(cuda->sequence.mismatches.get()[0], 7U);
  const auto slots = cuda->sequence.slots.get();
  const std::span from(slots.data() + slot_offset(cuda->sequence.kv, 0, 0, 7), shape.block_bytes());
  const std::span to(slots.data() + slot_offset(cuda->sequence.kv, 0, 0, 3), shape.block_bytes());
  EXPECT_TRUE(equal(from, to)) << "written through in the third step, and gathered from there";
}

}  // namespace
}  // namespace foretoken::kernels
