// The ops that move KV between scratch, slots and arena, and the checksum that guards it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "kernels/checksum.h"
#include "kernels/device.h"
#include "tests/kernels/kv_sequence.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261122;
const KvShape kShape{3, 2, 64, DataType::kFp16};

void fill(std::byte* data, std::size_t bytes, std::mt19937& random) {
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(random());
}

// The definition of kv_layout.h, word by word.
std::uint64_t plain_checksum(const std::byte* data, std::size_t bytes, int layer, int block) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < bytes / 8; ++i) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + 8 * i, 8);
    sum += mix_word(word, i);
  }
  return finish_checksum(sum, layer, block);
}

TEST(Checksum, IsItsDefinitionAtAnySize) {
  std::mt19937 random(kSeed);
  for (const std::size_t bytes : {8, 16, 24, 56, 64, 72, 4096, 8192, 65536}) {
    std::vector<std::byte> data(bytes);
    std::vector<std::byte> copy(bytes);
    fill(data.data(), bytes, random);
    EXPECT_EQ(block_checksum(data.data(), bytes, 5, 35), plain_checksum(data.data(), bytes, 5, 3));
    EXPECT_EQ(copy_with_checksum(copy.data(), data.data(), bytes, 5, 35),
              plain_checksum(data.data(), bytes, 5, 3));
    EXPECT_EQ(copy, data);
  }
}

TEST(Checksum, TellsPlacesApart) {
  const std::vector<std::byte> data(4096, std::byte{7});
  std::vector<std::uint64_t> seen;
  for (int layer = 0; layer < 64; ++layer) {
    for (int block = 0; block < kSegmentBlocks; ++block) {
      seen.push_back(block_checksum(data.data(), data.size(), layer, block));
    }
  }
  std::ranges::sort(seen);
  EXPECT_EQ(std::ranges::adjacent_find(seen), seen.end());
}

class KvOpsTest : public testing::Test {
 protected:
  static constexpr int kMaxBlocks = 40;
  static constexpr int kNumSlots = 20;
  static constexpr int kScratchTokens = 400;

  KvOpsTest()
      : device(make_cpu_device({1, 1 << 20})),
        compute(device->make_stream(StreamKind::kCompute)),
        copy(device->make_stream(StreamKind::kCopy)),
        k(scratch_bytes()),
        v(scratch_bytes()) {
    fill(k.data(), k.size(), random);
    fill(v.data(), v.size(), random);
  }

  static std::size_t row_bytes() { return 64 * 2; }
  static std::size_t scratch_bytes() { return 2 * kScratchTokens * row_bytes(); }

  // Half 0 is K, 1 is V.
  const std::byte* scratch_row(int half, int head, int token) const {
    const auto row = static_cast<std::size_t>(head * kScratchTokens + token);
    return (half == 0 ? k : v).data() + row * row_bytes();
  }
  static const std::byte* block_row(const std::byte* block, int half, int row) {
    return block + static_cast<std::size_t>(half * kBlockTokens + row) * row_bytes();
  }

  void pack(KvSequence& kv, int layer, int first_block, int num_blocks, int num_tokens,
            bool to_arena = true) {
    device->pack_blocks({k.data(), v.data(), kScratchTokens, 2, 64, layer, first_block, num_blocks,
                         num_tokens, to_arena, &kv.view},
                        *compute);
  }
  void pack_all_layers(KvSequence& kv, int num_tokens) {
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      pack(kv, layer, 0, blocks_for(num_tokens), num_tokens);
    }
  }
  std::uint32_t gather(KvSequence& kv, FetchTable& fetches, int layer) {
    const std::uint32_t before = kv.mismatches;
    device->gather({&kv.view, &fetches.view, 1, layer}, *copy);
    copy->synchronize();
    return kv.mismatches - before;
  }
  std::uint32_t unpack_one(KvSequence& kv, int layer, int block) {
    std::vector<std::byte> k_out(scratch_bytes());
    std::vector<std::byte> v_out(scratch_bytes());
    const std::uint32_t before = kv.mismatches;
    device->unpack_blocks(
        {k_out.data(), v_out.data(), kScratchTokens, 2, 64, layer, block, 1, &kv.view}, *copy);
    copy->synchronize();
    return kv.mismatches - before;
  }
  // One block of every (layer, head) into slot 0.
  static void ask_for(KvSequence& kv, FetchTable& fetches, int block) {
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      for (int head = 0; head < 2; ++head) {
        kv.place(layer, head, block, 0);
        fetches.counts[kv.head(layer, head)] = 1;
        fetches.entries[kv.head(layer, head) * static_cast<std::size_t>(fetches.view.max_entries)] =
            {block, 0};
      }
    }
  }

  std::mt19937 random{kSeed};
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> compute;
  std::unique_ptr<Stream> copy;
  std::vector<std::byte> k;
  std::vector<std::byte> v;
};

TEST_F(KvOpsTest, PacksRowsIntoBlocksOfArenaAndSlots) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  kv.place(1, 1, 17, 4);
  pack(kv, 1, 2, 18, 300);
  for (int head = 0; head < 2; ++head) {
    for (const int block : {2, 15, 16, 17}) {
      for (int half = 0; half < 2; ++half) {
        for (int row = 0; row < kBlockTokens; ++row) {
          ASSERT_EQ(std::memcmp(block_row(kv.arena_data(1, head, block), half, row),
                                scratch_row(half, head, block * kBlockTokens + row), row_bytes()),
                    0)
              << head << ' ' << block << ' ' << half << ' ' << row;
        }
      }
    }
  }
  EXPECT_EQ(std::memcmp(kv.slot_data(1, 1, 4), kv.arena_data(1, 1, 17), kShape.block_bytes()), 0);
}

TEST_F(KvOpsTest, PacksThePartOfTheLastBlockAndZeros) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  fill(kv.arena_data(0, 0, 18), kShape.block_bytes(), random);  // what the last owner left
  pack(kv, 0, 0, 25, 300);                                      // 18 blocks and 12 tokens
  const std::vector<std::byte> zeros(row_bytes());
  for (int row = 0; row < kBlockTokens; ++row) {
    const std::byte* expected = row < 12 ? scratch_row(1, 0, 288 + row) : zeros.data();
    EXPECT_EQ(std::memcmp(block_row(kv.arena_data(0, 0, 18), 1, row), expected, row_bytes()), 0);
  }
}

TEST_F(KvOpsTest, PacksOnlyIntoSlotsWhereAnotherRankWrites) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  kv.place(0, 0, 3, 0);
  const std::vector<std::byte> before(kv.slab(0, 3), kv.slab(0, 3) + kShape.slab_bytes());
  pack(kv, 0, 0, 10, 160, /*to_arena=*/false);
  EXPECT_EQ(std::memcmp(kv.slab(0, 3), before.data(), before.size()), 0);
  EXPECT_EQ(std::memcmp(kv.slot_data(0, 0, 0), scratch_row(0, 0, 48), 16 * row_bytes()), 0);
}

TEST_F(KvOpsTest, UnpackUndoesPack) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  pack_all_layers(kv, 400);
  std::vector<std::byte> k_again(scratch_bytes());
  std::vector<std::byte> v_again(scratch_bytes());
  const UnpackBlocksArgs args{k_again.data(), v_again.data(), kScratchTokens, 2, 64, 2, 0, 25,
                              &kv.view};
  device->unpack_blocks(args, *copy);
  copy->synchronize();
  EXPECT_EQ(kv.mismatches, 0U);
  EXPECT_EQ(k_again, k);
  EXPECT_EQ(v_again, v);

  kv.arena_data(2, 1, 9)[77] ^= std::byte{4};
  device->unpack_blocks(args, *copy);
  copy->synchronize();
  EXPECT_EQ(kv.mismatches, 1U);
  const auto* row = k_again.data() + (kScratchTokens + 9 * kBlockTokens) * row_bytes();
  EXPECT_EQ(std::count(row, row + 16 * row_bytes(), std::byte{0}), 16 * 128) << "wrong bytes leak";
}

TEST_F(KvOpsTest, GathersIntoSlots) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  FetchTable fetches(kShape, 4);
  pack_all_layers(kv, 400);
  ask_for(kv, fetches, 21);
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    EXPECT_EQ(gather(kv, fetches, layer), 0U);
    for (int head = 0; head < 2; ++head) {
      EXPECT_EQ(std::memcmp(kv.slot_data(layer, head, 0), kv.arena_data(layer, head, 21),
                            kShape.block_bytes()),
                0);
      EXPECT_EQ(kv.slot(layer, head, 21), 0);
    }
  }
}

// Each fault is seen, counted once, and only the block that has it is made absent, or zeros.
// FORETOKEN_FAULTS sets how many are injected (2,000).
TEST_F(KvOpsTest, EveryInjectedFaultIsFound) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  FetchTable fetches(kShape, 4);
  pack_all_layers(kv, 400);
  const std::vector<std::byte> stale(kv.slab(0, 0), kv.slab(0, 0) + kShape.slab_bytes());
  fill(k.data(), k.size(), random);  // other tokens, in the same slabs
  pack_all_layers(kv, 400);
  const std::vector<std::byte> clean(kv.slab(0, 0), kv.slab(0, 0) + kShape.slab_bytes());
  const std::size_t block_bytes = kShape.block_bytes();
  constexpr int kLayer = 1;
  constexpr int kBlock = 6;
  const char* wanted = std::getenv("FORETOKEN_FAULTS");
  const int num_faults = wanted == nullptr ? 2'000 : std::atoi(wanted);
  for (int fault = 0; fault < num_faults; ++fault) {
    std::byte* block = kv.arena_data(kLayer, 0, kBlock);
    std::byte* checksum = kv.slab(0, 0) + slab_checksum_offset(kShape, kLayer, kBlock);
    switch (fault % 8) {
      case 0:  // 1 to 64 flipped bits, at distinct places
        for (unsigned bit = random() % 64 + 1, at = random(); bit > 0; --bit, at += 517) {
          block[at % block_bytes] ^= static_cast<std::byte>(1U << at / 7 % 8);
        }
        break;
      case 1: {  // swapped with another block of the run, checksums swapped or not
        const int other = (kBlock + 1 + static_cast<int>(random() % 15)) % kSegmentBlocks;
        std::swap_ranges(block, block + block_bytes, kv.arena_data(kLayer, 0, other));
        if (random() % 2 == 0) {
          std::swap_ranges(checksum, checksum + 8,
                           kv.slab(0, 0) + slab_checksum_offset(kShape, kLayer, other));
        }
        break;
      }
      case 2:  // torn: the tail is of another block
        std::memcpy(block + block_bytes / 2, kv.arena_data(kLayer, 0, kBlock + 1), block_bytes / 2);
        break;
      case 3:  // the checksum itself
        checksum[random() % 8] ^= std::byte{1};
        break;
      case 4:  // the same block of another layer, with its checksum
        std::memcpy(block, kv.arena_data(0, 0, kBlock), block_bytes);  // equal bytes, here
        std::memcpy(checksum, kv.slab(0, 0) + slab_checksum_offset(kShape, 0, kBlock), 8);
        break;
      case 5:  // a write that was lost: what the slab held before
        std::memcpy(block, stale.data() + slab_block_offset(kShape, kLayer, kBlock), block_bytes);
        break;
      case 6:  // the same place of another head
        std::memcpy(block, kv.arena_data(kLayer, 1, kBlock), block_bytes);
        break;
      case 7:  // cut off
        std::memset(block + random() % block_bytes / 8 * 8, 0, 8);
        break;
    }
    if (fault % 16 >= 8) {
      ASSERT_EQ(unpack_one(kv, kLayer, kBlock), 1U) << "fault " << fault;
      std::ranges::copy(clean, kv.slab(0, 0));
      continue;
    }
    ask_for(kv, fetches, kBlock);
    ASSERT_EQ(gather(kv, fetches, kLayer), 1U) << "fault " << fault;
    ASSERT_EQ(kv.slot(kLayer, 0, kBlock), kAbsent);
    ASSERT_EQ(kv.block(kLayer, 0, 0), kAbsent);
    ASSERT_EQ(kv.slot(kLayer, 1, kBlock), 0) << "the other head has no fault";
    std::ranges::copy(clean, kv.slab(0, 0));
  }
}

// The step writes to it, so it needs its slot: without the wrong bytes.
TEST_F(KvOpsTest, AnOpenBlockThatFailsItsCheckStaysAsZeros) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  FetchTable fetches(kShape, 4);
  pack_all_layers(kv, 400);
  kv.length = 6 * kBlockTokens + 3;
  kv.arena_data(1, 0, 6)[5] ^= std::byte{1};
  ask_for(kv, fetches, 6);
  EXPECT_EQ(gather(kv, fetches, 1), 1U);
  EXPECT_EQ(kv.slot(1, 0, 6), 0);
  const std::byte* slot = kv.slot_data(1, 0, 0);
  const auto block_bytes = static_cast<std::ptrdiff_t>(kShape.block_bytes());
  EXPECT_EQ(std::count(slot, slot + block_bytes, std::byte{0}), block_bytes);
  EXPECT_EQ(std::memcmp(kv.slot_data(1, 1, 0), kv.arena_data(1, 1, 6), kShape.block_bytes()), 0);
}

TEST_F(KvOpsTest, ABlockThatIsNotInHostMemoryIsAMiss) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  FetchTable fetches(kShape, 4);
  pack_all_layers(kv, 400);
  std::vector<std::byte*> slabs(kv.view.slabs, kv.view.slabs + 2 * kv.view.max_segments);
  slabs[0] = nullptr;  // head 0, segment 0
  kv.view.slabs = slabs.data();
  ask_for(kv, fetches, 6);
  EXPECT_EQ(gather(kv, fetches, 0), 1U);
  EXPECT_EQ(kv.slot(0, 0, 6), kAbsent);
  EXPECT_EQ(kv.slot(0, 1, 6), 0);
}

// An outsized sequence's runs lie anywhere, and its checksums apart from them: what is packed,
// gathered and verified is the same. A run that is on NVMe is late, which is no fault.
TEST_F(KvOpsTest, AnOutsizedSequenceIsPackedAndGatheredByItsRuns) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  KvSequence outsized(kShape, kNumSlots, kMaxBlocks);
  FetchTable fetches(kShape, 4);
  outsized.make_outsized();
  std::ranges::reverse(outsized.runs);
  pack_all_layers(kv, 400);
  pack_all_layers(outsized, 400);
  for (const int block : {0, 17, 24}) {
    for (KvSequence* sequence : {&kv, &outsized}) ask_for(*sequence, fetches, block);
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      ASSERT_EQ(gather(kv, fetches, layer), 0U);
      ASSERT_EQ(gather(outsized, fetches, layer), 0U);
      for (int head = 0; head < 2; ++head) {
        ASSERT_EQ(std::memcmp(kv.slot_data(layer, head, 0), outsized.slot_data(layer, head, 0),
                              kShape.block_bytes()),
                  0);
      }
    }
  }
  const std::size_t run = run_index(outsized.view, 1, 1, 17);
  outsized.checksums[run * kSegmentBlocks + 1] ^= 1;
  ask_for(outsized, fetches, 17);
  EXPECT_EQ(gather(outsized, fetches, 1), 1U);
  EXPECT_EQ(outsized.slot(1, 1, 17), kAbsent);
  EXPECT_EQ(outsized.slot(1, 0, 17), 0);
  outsized.runs[run] = nullptr;
  ask_for(outsized, fetches, 17);
  EXPECT_EQ(gather(outsized, fetches, 1), 0U);
  EXPECT_EQ(outsized.slot(1, 1, 17), kAbsent);
  EXPECT_EQ(outsized.block(1, 1, 0), kAbsent);
}

// Decode fills a block token by token; the step that fills it writes it through, and it comes back
// as it was.
TEST_F(KvOpsTest, WritesThroughTheBlockThatAStepFilled) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  KvSequence other(kShape, kNumSlots, kMaxBlocks);
  kv.length = 46;
  other.length = 3;
  const SequenceKv rows[] = {kv.view, other.view};
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    for (int head = 0; head < 2; ++head) {
      kv.place(layer, head, 2, 7);
      fill(kv.slot_data(layer, head, 7), kShape.block_bytes(), random);
    }
  }
  const std::vector<std::byte> untouched(kv.slab(0, 0), kv.slab(0, 0) + kShape.slab_bytes());
  const auto step = [&](bool to_slabs) {
    device->advance({rows, 2}, *compute);
    device->write_through({rows, 2, to_slabs}, *compute);
  };
  step(true);
  EXPECT_EQ(kv.length, 47);
  EXPECT_EQ(std::memcmp(kv.slab(0, 0), untouched.data(), untouched.size()), 0) << "not full yet";
  step(false);
  EXPECT_EQ(kv.length, 48);
  EXPECT_EQ(std::memcmp(kv.slab(0, 0), untouched.data(), untouched.size()), 0) << "not our head";

  kv.length = 47;
  step(true);
  EXPECT_EQ(other.length, 6);
  FetchTable fetches(kShape, 4);
  ask_for(kv, fetches, 2);
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    EXPECT_EQ(gather(kv, fetches, layer), 0U);
    for (int head = 0; head < 2; ++head) {
      EXPECT_EQ(std::memcmp(kv.slot_data(layer, head, 0), kv.slot_data(layer, head, 7),
                            kShape.block_bytes()),
                0);
    }
  }
}

// A head whose slabs another rank writes: an outsized sequence's runs are this rank's own.
TEST_F(KvOpsTest, WritesThroughToRunsWhereAnotherRankWritesTheSlabs) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  KvSequence outsized(kShape, kNumSlots, kMaxBlocks);
  outsized.make_outsized();
  for (KvSequence* sequence : {&kv, &outsized}) {
    sequence->length = 48;
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      for (int head = 0; head < 2; ++head) {
        sequence->place(layer, head, 2, 7);
        fill(sequence->slot_data(layer, head, 7), kShape.block_bytes(), random);
      }
    }
  }
  const std::vector<std::byte> untouched(kv.slab(0, 0), kv.slab(0, 0) + kShape.slab_bytes());
  const SequenceKv rows[] = {kv.view, outsized.view};
  device->write_through({rows, 2, /*to_slabs=*/false}, *compute);
  EXPECT_EQ(std::memcmp(kv.slab(0, 0), untouched.data(), untouched.size()), 0);
  FetchTable fetches(kShape, 4);
  ask_for(outsized, fetches, 2);
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    EXPECT_EQ(gather(outsized, fetches, layer), 0U);
    for (int head = 0; head < 2; ++head) {
      EXPECT_EQ(std::memcmp(outsized.slot_data(layer, head, 0), outsized.slot_data(layer, head, 7),
                            kShape.block_bytes()),
                0);
    }
  }
}

// The arena may hold an older state of a block whose slot was lost; it must not pass for the block.
TEST_F(KvOpsTest, ALostBlockIsNeverReadBackStale) {
  KvSequence kv(kShape, kNumSlots, kMaxBlocks);
  pack_all_layers(kv, 40);  // block 2 half full
  kv.length = 47;
  device->advance({&kv.view, 1}, *compute);
  device->write_through({&kv.view, 1, true}, *compute);  // block 2 is in no slot
  FetchTable fetches(kShape, 4);
  ask_for(kv, fetches, 2);
  EXPECT_EQ(gather(kv, fetches, 0), 2U);
}

}  // namespace
}  // namespace foretoken::kernels
