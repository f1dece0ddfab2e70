// The NVMe tier over a file in memory: what it keeps, what it gives up, and how it meets a bad
// disk.
#include "kvstore/internal/nvme_tier.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>

#include "tests/kvstore/tier_on_file.h"

namespace foretoken::kvstore {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

bool is_read(const IoOperation& operation) { return operation.direction == IoDirection::kRead; }

class NvmeTierTest : public testing::Test {
 protected:
  // As a rank does with a slot that it was lent.
  NvmeTier::Filled fill_slot(const TierOnFile& disk, SlotIndex slot, const SlabName& name) {
    const auto slab = test_slab(name);
    const kernels::KvShape shape = kTestModel.slab_shape();
    const std::size_t table = 8 * kSegmentBlocks * static_cast<std::size_t>(shape.num_layers);
    std::memcpy(file.data() + disk.contents.superblock.geometry.slab_offset(slot), slab.data(),
                slab.size());
    return {slot, slab_digest(std::span(slab).subspan(shape.slab_payload_bytes(), table)), {}};
  }

  FileBytes file;
};

TEST_F(NvmeTierTest, GivesBackWhatItWasGiven) {
  TierOnFile disk(file, 8);
  for (std::uint32_t i = 0; i < 5; ++i) EXPECT_TRUE(disk.store(test_name(i % 3, i)));
  for (std::uint32_t i = 0; i < 5; ++i) {
    const auto slab = disk.load(test_name(i % 3, i));
    ASSERT_TRUE(slab);
    EXPECT_TRUE(same_slab(slab->data(), test_name(i % 3, i)));
  }
  EXPECT_FALSE(disk.load(test_name(1, 0))) << "another head's";
  const NvmeStat stat = disk.tier->stat();
  EXPECT_EQ(stat.state, NvmeState::kOnline);
  EXPECT_EQ(stat.slabs_total, 8);
  EXPECT_EQ(stat.slabs_held, 5);
  EXPECT_EQ(stat.slabs_written, 5);
  EXPECT_EQ(stat.slabs_read, 5);
  EXPECT_EQ(stat.bytes_written, static_cast<std::int64_t>(5 * kTestModel.slab_bytes()));
  EXPECT_EQ(stat.bytes_read, stat.bytes_written);
  EXPECT_EQ(stat.checksum_failures, 0);
}

TEST_F(NvmeTierTest, ARestartFindsTheSlabsInTheirOrder) {
  {
    TierOnFile disk(file, 3);
    for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  }
  TierOnFile disk(file, 3);
  EXPECT_EQ(disk.contents.superblock.generation, 2U);
  EXPECT_EQ(disk.tier->stat().slabs_held, 3);
  ASSERT_TRUE(disk.store(test_name(0, 3)));
  EXPECT_FALSE(disk.load(test_name(0, 0))) << "the oldest gave way";
  for (std::uint32_t i = 1; i < 4; ++i) EXPECT_TRUE(disk.load(test_name(0, i))) << i;
}

// Segments of three prefixes, two of which begin alike: as the last write of each left them, and
// each from its end. Of three heads.
TEST_F(NvmeTierTest, AfterARestartTooAPrefixGivesWayFromItsEnd) {
  struct Segment {
    std::uint32_t number;
    std::optional<std::uint32_t> previous;
  };
  const std::array<Segment, 7> written{
      {{21, {}}, {1, {}}, {2, 1}, {3, 2}, {22, 21}, {11, 1}, {12, 11}}};
  const std::array<std::uint32_t, 7> gives_way{3, 2, 22, 21, 12, 11, 1};
  for (const auto& cipher : {std::shared_ptr<const KvCipher>(), KvCipher::random()}) {
    file.clear();
    const auto open = [&] {
      return TierOnFile(file, 3 * written.size(), NvmeReuse::kKeepSlabs, kTestModel, cipher);
    };
    {
      TierOnFile disk = open();
      for (const auto& [number, previous] : written) {
        for (int head = 0; head < 3; ++head) {
          const auto key = previous ? std::optional(test_name(0, *previous).key) : std::nullopt;
          ASSERT_TRUE(disk.store(test_name(head, number), key));
        }
      }
    }
    TierOnFile disk = open();
    for (auto next = gives_way.begin(); next != gives_way.end(); ++next) {
      ASSERT_TRUE(disk.tier->lend(3, disk.now));
      for (const auto& segment : written) {
        const bool is_there =
            std::find(next + 1, gives_way.end(), segment.number) != gives_way.end();
        for (int head = 0; head < 3; ++head) {
          EXPECT_EQ(disk.tier->knows(test_name(head, segment.number)), is_there)
              << segment.number << " when " << *next << " gives way";
        }
      }
    }
  }
}

// A header of one head is enough, as where an older store has written the other's.
TEST_F(NvmeTierTest, WhatOneHeadSaysOfASegmentIsOfAll) {
  {
    TierOnFile disk(file, 4);
    ASSERT_TRUE(disk.store(test_name(0, 1)) && disk.store(test_name(1, 1)));
    ASSERT_TRUE(disk.store(test_name(0, 2), test_name(0, 1).key) && disk.store(test_name(1, 2)));
  }
  TierOnFile disk(file, 4);
  ASSERT_TRUE(disk.tier->lend(2, disk.now));
  for (int head = 0; head < 2; ++head) {
    EXPECT_TRUE(disk.tier->knows(test_name(head, 1))) << head;
    EXPECT_FALSE(disk.tier->knows(test_name(head, 2))) << head;
  }
}

// ... or its last use, where the store had time to say so. Nothing else of the slabs changes.
TEST_F(NvmeTierTest, AfterARestartTheLeastRecentlyUsedGivesWay) {
  const auto key_of = [](std::uint32_t number) { return test_name(0, number).key; };
  for (const auto& cipher : {std::shared_ptr<const KvCipher>(), KvCipher::random()}) {
    for (const bool saves : {false, true}) {
      file.clear();
      const auto open = [&] {
        return TierOnFile(file, 7, NvmeReuse::kKeepSlabs, kTestModel, cipher);
      };
      {
        TierOnFile disk = open();
        ASSERT_TRUE(disk.store(test_name(0, 1)) && disk.store(test_name(0, 2), key_of(1)));
        ASSERT_TRUE(disk.store(test_name(0, 11)) && disk.store(test_name(0, 12), key_of(11)));
        disk.tier->note_use(std::array{key_of(1), key_of(2), key_of(3)});  // which is not here
        ASSERT_TRUE(disk.store(test_name(0, 21)));                         // later than that use
        if (saves) disk.tier->save_uses(disk.now);
        disk.finish();
        EXPECT_EQ(disk.tier->stat().slabs_written, 5);
      }
      TierOnFile disk = open();
      ASSERT_TRUE(disk.tier->lend(4, disk.now));  // two are free
      for (const std::uint32_t number : {1, 2, 11, 12, 21}) {
        const bool is_there = number == 21 || (number < 11) == saves;
        EXPECT_EQ(disk.load(test_name(0, number)).has_value(), is_there) << number << ' ' << saves;
      }
      EXPECT_EQ(disk.tier->stat().checksum_failures, 0);
    }
  }
}

// A header's number that leaves no room for the next ones, in a file that is not encrypted.
TEST_F(NvmeTierTest, ANumberThatNoStoreWritesHarmsNoOrder) {
  for (const std::uint64_t number : {UINT64_MAX, UINT64_MAX - 1}) {
    file.clear();
    {
      TierOnFile disk(file, 3);
      for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
      const auto at = disk.contents.superblock.geometry.header_offset(SlotIndex{0});
      const Sector sector(file.data() + at, kSectorBytes);
      auto header =
          *decode_slot_header(sector, SlotIndex{0}, disk.contents.superblock.file_id).value();
      header.number = number;
      encode(header, sector);
    }
    {
      TierOnFile disk(file, 3);
      ASSERT_TRUE(disk.store(test_name(0, 3)) && disk.store(test_name(0, 4)));
    }
    TierOnFile disk(file, 3);
    ASSERT_TRUE(disk.tier->lend(1, disk.now));
    EXPECT_FALSE(disk.tier->knows(test_name(0, 2))) << "the oldest";
    EXPECT_TRUE(disk.tier->knows(test_name(0, 3)) && disk.tier->knows(test_name(0, 4)));
  }
}

// What stands behind a gap serves nobody, whoever asks for it.
TEST_F(NvmeTierTest, AUseIsOfThePrefixUpToItsFirstGap) {
  const auto key_of = [](std::uint32_t number) { return test_name(0, number).key; };
  {
    TierOnFile disk(file, 3);
    ASSERT_TRUE(disk.store(test_name(0, 1)) && disk.store(test_name(0, 3), key_of(2)));
    ASSERT_TRUE(disk.store(test_name(0, 11)));
    disk.tier->note_use(std::array{key_of(1), key_of(2), key_of(3)});
    disk.tier->note_use(std::array{key_of(2), key_of(3)});
    disk.tier->note_use({});
    disk.tier->save_uses(disk.now);
    disk.finish();
  }
  TierOnFile disk(file, 3);
  for (const std::uint32_t number : {3, 11}) {
    ASSERT_TRUE(disk.tier->lend(1, disk.now));
    EXPECT_FALSE(disk.tier->knows(test_name(0, number))) << number;
  }
  EXPECT_TRUE(disk.tier->knows(test_name(0, 1)));
}

// A prefix whose beginning is gone serves nobody, whenever it was written.
TEST_F(NvmeTierTest, AfterARestartWhatBuildsOnNothingGivesWayFirst) {
  const auto key_of = [](std::uint32_t number) { return test_name(0, number).key; };
  {
    TierOnFile disk(file, 6);
    ASSERT_TRUE(disk.store(test_name(0, 1)) && disk.store(test_name(0, 2), key_of(1)));
    ASSERT_TRUE(disk.store(test_name(0, 3), key_of(1)));
    ASSERT_TRUE(disk.store(test_name(0, 22), key_of(21)));
    ASSERT_TRUE(disk.store(test_name(0, 23), key_of(22)));
    ASSERT_TRUE(disk.store(test_name(0, 24), key_of(22)));
  }
  TierOnFile disk(file, 6);
  for (const std::uint32_t number : {23, 24, 22, 2, 3}) {
    ASSERT_TRUE(disk.tier->knows(test_name(0, number))) << number;
    ASSERT_TRUE(disk.tier->lend(1, disk.now));
    EXPECT_FALSE(disk.tier->knows(test_name(0, number))) << number;
  }
}

// Keys that no store writes, in a file that is not encrypted: the opening ends, with all of them.
TEST_F(NvmeTierTest, SegmentsThatGoInACircleAreFoundToo) {
  {
    TierOnFile disk(file, 3);
    for (std::uint32_t i = 0; i < 3; ++i) {
      ASSERT_TRUE(disk.store(test_name(0, i), test_name(0, (i + 1) % 3).key));
    }
  }
  EXPECT_EQ(TierOnFile(file, 3).tier->stat().slabs_held, 3);
}

TEST_F(NvmeTierTest, AFreshStartFindsNothing) {
  { EXPECT_TRUE(TierOnFile(file, 4).store(test_name(0, 1))); }
  TierOnFile disk(file, 4, NvmeReuse::kStartAfresh);
  EXPECT_EQ(disk.tier->stat().slabs_held, 0);
}

TEST_F(NvmeTierTest, AnotherModelsFileStartsAfresh) {
  { EXPECT_TRUE(TierOnFile(file, 4).store(test_name(0, 1))); }
  ModelIdentity other = kTestModel;
  other.model_hash = "another";
  EXPECT_EQ(TierOnFile(file, 4, NvmeReuse::kKeepSlabs, other).tier->stat().slabs_held, 0);
  EXPECT_EQ(TierOnFile(file, 4).tier->stat().slabs_held, 0) << "nor is it ours any more";
}

// A file of one size, whose superblock lays out another one.
TEST_F(NvmeTierTest, ASuperblockOfAnotherSizeIsNone) {
  { EXPECT_TRUE(TierOnFile(file, 4).store(test_name(0, 1))); }
  const FileBytes whole = file;
  Superblock hostile = decode_superblock(std::span(file).first<kSectorBytes>()).value();
  hostile.generation += 2;
  hostile.geometry.num_slots = UINT32_MAX - 1;
  encode(hostile, std::span(file).first<kSectorBytes>());
  {
    TierOnFile disk(file, 4);
    EXPECT_TRUE(disk.load(test_name(0, 1))) << "the other copy is right";
  }
  for (const std::size_t copy : {0, 1}) {
    encode(hostile, std::span(file).subspan(copy * kSectorBytes).first<kSectorBytes>());
  }
  MemoryDevice device(file);
  IoMemory memory(1 << 20);
  const auto found = read_superblock(device, memory.bytes());
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(found.error().message.find("4294967294 slots"), std::string::npos);
  NvmeOpening opening{kTestModel, std::nullopt, 1 << 20, NvmeReuse::kKeepSlabs};
  const auto contents = open_contents(device, memory.bytes(), opening);
  ASSERT_TRUE(contents);
  EXPECT_EQ(contents->superblock.generation, 1U);
  EXPECT_LE(file.size(), std::size_t{1} << 20);
  file = whole;
  file.resize(file.size() - 1);  // cut off while nobody ran
  EXPECT_FALSE(read_superblock(device, memory.bytes()));
}

TEST_F(NvmeTierTest, AFileThatCantBeReadIsLeftAsItIs) {
  { EXPECT_TRUE(TierOnFile(file, 4).store(test_name(0, 1))); }
  const FileBytes before = file;
  IoMemory memory(1 << 20);
  const NvmeOpening opening{kTestModel, std::nullopt, 1 << 20, NvmeReuse::kKeepSlabs};
  for (const std::uint64_t damaged : {0, 1, 2}) {  // of the copies, none or one is also damaged
    file = before;
    if (damaged > 0) file[(damaged - 1) * kSectorBytes] ^= std::byte{1};
    const FileBytes found = file;
    MemoryDevice device(file);
    device.fault = [&](const IoOperation& operation) {
      const bool can_be_read = damaged > 0 && operation.offset == (damaged - 1) * kSectorBytes;
      return can_be_read ? IoFault::kNone : IoFault::kError;
    };
    const auto contents = open_contents(device, memory.bytes(), opening);
    ASSERT_FALSE(contents);
    EXPECT_EQ(contents.error().code, ErrorCode::kIo);
    EXPECT_NE(contents.error().message.find("left as it is"), std::string::npos);
    EXPECT_EQ(file, found);
  }
}

TEST_F(NvmeTierTest, SlotsWhoseHeadersCantBeReadAreLeftOut) {
  {
    TierOnFile disk(file, 6);
    for (std::uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  }
  const NvmeGeometry geometry{kTestModel.slab_bytes(), 6};
  // Slot 1 holds a slab, slot 5 none; whatever else is read with them fails too.
  const auto bad_sectors = [&](const IoOperation& operation) {
    const auto covers = [&](std::uint32_t slot) {
      const std::uint64_t at = geometry.header_offset(SlotIndex{slot});
      return operation.offset <= at && at < operation.offset + operation.bytes;
    };
    return is_read(operation) && (covers(1) || covers(5)) ? IoFault::kError : IoFault::kNone;
  };
  for (int start = 0; start < 2; ++start) {  // the next one finds them as bad
    TierOnFile disk(file, 6, NvmeReuse::kKeepSlabs, kTestModel, nullptr, bad_sectors);
    EXPECT_EQ(disk.contents.unreadable, (std::vector<SlotIndex>{SlotIndex{1}, SlotIndex{5}}));
    EXPECT_EQ(disk.contents.bad_headers, 0);
    const NvmeStat stat = disk.tier->stat();
    EXPECT_EQ(stat.state, NvmeState::kOnline);
    EXPECT_EQ(stat.slabs_total, 4);
    EXPECT_EQ(stat.slabs_held, 3 + start);
    EXPECT_EQ(stat.io_errors, 2);
    EXPECT_FALSE(disk.load(test_name(0, 1)));
    for (const std::uint32_t i : {0U, 2U, 3U}) EXPECT_TRUE(disk.load(test_name(0, i))) << i;
    if (start == 0) {
      EXPECT_TRUE(disk.store(test_name(0, 7)));  // to slot 4, the only free one
      EXPECT_EQ(disk.tier->stat().evictions, 0);
    }
    EXPECT_TRUE(disk.load(test_name(0, 7)));
  }
  TierOnFile disk(file, 6, NvmeReuse::kKeepSlabs, kTestModel, nullptr, bad_sectors);
  EXPECT_TRUE(disk.store(test_name(0, 8)));
  EXPECT_EQ(disk.tier->stat().evictions, 1) << "no slot that was left out is taken";
}

TEST_F(NvmeTierTest, ADiskThatReadsNoHeadersIsNoTier) {
  constexpr std::uint32_t kSlots = 100;
  { EXPECT_TRUE(TierOnFile(file, kSlots).store(test_name(0, 1))); }
  IoMemory memory(1 << 20);
  MemoryDevice device(file);
  device.fault = [](const IoOperation& operation) {
    const bool header = operation.offset >= 2 * kSectorBytes;
    return is_read(operation) && header ? IoFault::kError : IoFault::kNone;
  };
  const auto contents =
      open_contents(device, memory.bytes(), {kTestModel, std::nullopt, 0, NvmeReuse::kKeepSlabs});
  ASSERT_FALSE(contents);
  EXPECT_EQ(contents.error().code, ErrorCode::kIo);
  device.fault = nullptr;
  EXPECT_EQ(
      open_contents(device, memory.bytes(), {kTestModel, std::nullopt, 0, NvmeReuse::kKeepSlabs})
          ->slabs.size(),
      1U)
      << "nothing was lost";
}

TEST_F(NvmeTierTest, TheLeastRecentlyUsedGivesWay) {
  TierOnFile disk(file, 3);
  for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  disk.tier->touch(test_name(0, 0));
  disk.tier->touch(test_name(0, 1));
  ASSERT_TRUE(disk.store(test_name(0, 3)));
  EXPECT_FALSE(disk.tier->knows(test_name(0, 2)));
  EXPECT_TRUE(disk.load(test_name(0, 0)) && disk.load(test_name(0, 1)));
  EXPECT_EQ(disk.tier->stat().evictions, 1);
}

// Without its first segments the rest of a prefix is of no use. Of three heads two ranks write,
// side by side.
TEST_F(NvmeTierTest, APrefixGivesWayFromItsEnd) {
  constexpr std::uint32_t kSegments = 4;
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    file.clear();
    TierOnFile disk(file, kSegments * 3);
    std::vector<std::vector<SlabName>> ranks(2);
    for (std::uint32_t i = kSegments * 3; i-- > 0;)
      ranks[i % 3 / 2].push_back(test_name(i % 3, i / 3));
    while (!ranks[0].empty() || !ranks[1].empty()) {
      std::vector<SlabName>& rank = ranks[random() % 2];
      if (rank.empty()) continue;
      const SlabName name = rank.back();
      rank.pop_back();
      std::uint32_t segment = 0;
      std::memcpy(&segment, name.key.bytes.data(), sizeof segment);
      const auto previous =
          segment > 0 ? std::optional(test_name(0, segment - 1).key) : std::nullopt;
      disk.tier->store(name, test_slab(name).data(), disk.now, previous);
    }
    disk.finish();
    for (std::uint32_t left = 3 * kSegments; left-- > 1;) {
      ASSERT_TRUE(disk.tier->lend(1, disk.now));
      for (std::uint32_t segment = 0; segment < left / 3; ++segment) {
        for (int head = 0; head < 3; ++head) {
          EXPECT_TRUE(disk.tier->knows(test_name(head, segment))) << round << ' ' << left;
        }
      }
    }
  }
}

TEST_F(NvmeTierTest, ACheckIsNoUse) {
  for (int num_checks = 0; num_checks < 4; ++num_checks) {
    file.clear();
    TierOnFile disk(file, 3);
    for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
    disk.tier->touch(test_name(0, 0));
    for (int i = 0; i < num_checks; ++i) {
      disk.now = disk.tier->deadline().value();
      disk.finish();
    }
    ASSERT_TRUE(disk.store(test_name(0, 3)));
    EXPECT_FALSE(disk.tier->knows(test_name(0, 1))) << num_checks;
  }
}

TEST_F(NvmeTierTest, ASlabOfTheArenaThatIsWrongIsNotWritten) {
  TierOnFile disk(file, 3);
  auto slab = test_slab(test_name(0, 1));
  slab[100] ^= std::byte{4};
  EXPECT_FALSE(disk.tier->store(test_name(0, 1), slab.data(), disk.now));
  disk.finish();
  EXPECT_FALSE(disk.tier->knows(test_name(0, 1)));
  EXPECT_EQ(disk.tier->stat().host_checksum_failures, 1);
}

TEST_F(NvmeTierTest, ShortOperationsAreFinished) {
  TierOnFile disk(file, 3);
  int count = 0;
  disk.device->fault = [&](const IoOperation& operation) {
    return operation.bytes > kSectorBytes && ++count % 3 != 0 ? IoFault::kShort : IoFault::kNone;
  };
  ASSERT_TRUE(disk.store(test_name(0, 1)));
  const auto slab = disk.load(test_name(0, 1));
  ASSERT_TRUE(slab);
  EXPECT_TRUE(same_slab(slab->data(), test_name(0, 1)));
  EXPECT_EQ(disk.tier->stat().io_errors, 0);
}

TEST_F(NvmeTierTest, ATruncatedFileIsAMiss) {
  TierOnFile disk(file, 3);
  ASSERT_TRUE(disk.store(test_name(0, 1)));
  file.resize(file.size() / 3);
  EXPECT_FALSE(disk.load(test_name(0, 1)));
  EXPECT_EQ(disk.tier->stat().io_errors, 1);
  EXPECT_FALSE(disk.tier->knows(test_name(0, 1)));
}

TEST_F(NvmeTierTest, AFullDiskStopsWritesUntilThereIsSpace) {
  TierOnFile disk(file, 8);
  ASSERT_TRUE(disk.store(test_name(0, 1)));
  bool is_full = true;
  disk.device->fault = [&](const IoOperation& operation) {
    return is_full && !is_read(operation) ? IoFault::kFull : IoFault::kNone;
  };
  EXPECT_FALSE(disk.store(test_name(0, 2)));
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kReadOnly);
  EXPECT_TRUE(disk.load(test_name(0, 1))) << "reads go on";
  EXPECT_FALSE(disk.tier->can_store(disk.now));
  disk.wait(seconds(1));
  EXPECT_FALSE(disk.store(test_name(0, 2)));
  disk.wait(seconds(1));
  EXPECT_FALSE(disk.tier->can_store(disk.now)) << "the pause has doubled";
  disk.wait(seconds(1));
  is_full = false;
  EXPECT_TRUE(disk.store(test_name(0, 2)));
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOnline);
  EXPECT_EQ(disk.tier->stat().io_errors, 0);
}

TEST_F(NvmeTierTest, ABrokenDiskIsLeftAloneUntilItWorks) {
  TierOnFile disk(file, 8);
  for (std::uint32_t i = 0; i < 5; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  disk.device->fault = [](const IoOperation&) { return IoFault::kError; };
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_FALSE(disk.load(test_name(0, i)));
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOffline);
  EXPECT_FALSE(disk.tier->has(test_name(0, 3), disk.now));
  EXPECT_FALSE(disk.tier->can_store(disk.now));
  disk.wait(seconds(1));
  disk.device->fault = nullptr;
  EXPECT_TRUE(disk.load(test_name(0, 3)));
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOnline);
  EXPECT_EQ(disk.tier->stat().io_errors, 3);
  EXPECT_EQ(disk.tier->stat().slabs_held, 2) << "what failed is forgotten";
}

TEST_F(NvmeTierTest, AReadThatNeverEndsIsGivenUp) {
  TierOnFile disk(file, 8);
  for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  disk.device->fault = [](const IoOperation&) { return IoFault::kHeld; };
  std::vector<std::byte> to(kTestModel.slab_bytes());
  disk.tier->load(test_name(0, 0), to.data(), disk.now);
  EXPECT_TRUE(disk.finish().empty());
  ASSERT_TRUE(disk.tier->deadline());
  disk.wait(seconds(1));
  const auto loaded = disk.finish();
  ASSERT_EQ(loaded.size(), 1U);
  EXPECT_FALSE(loaded.front().is_whole);
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOffline);
  EXPECT_FALSE(disk.tier->deadline());

  disk.wait(seconds(1));
  disk.device->fault = nullptr;
  EXPECT_TRUE(disk.load(test_name(0, 0))) << "the name is kept";
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOnline);
  EXPECT_FALSE(disk.tier->deadline()) << "nothing is due while one is out";
  to.assign(to.size(), std::byte{0});
  disk.device->release_held();
  EXPECT_TRUE(disk.finish().empty());
  EXPECT_EQ(to, std::vector<std::byte>(to.size())) << "late bytes reach nobody";
}

// What is opened on its way ends when somebody looks a second time.
TEST_F(NvmeTierTest, TimeInWhichNobodyLookedIsNotTheDisks) {
  TierOnFile disk(file, 2, NvmeReuse::kKeepSlabs, kTestModel, KvCipher::random());
  ASSERT_TRUE(disk.store(test_name(0, 0)));
  EXPECT_TRUE(disk.tier->advance(disk.now).empty());
  std::vector<std::byte> to(kTestModel.slab_bytes());
  disk.tier->load(test_name(0, 0), to.data(), disk.now);
  disk.wait(milliseconds(1500));
  const auto loaded = disk.finish();
  ASSERT_EQ(loaded.size(), 1U);
  EXPECT_TRUE(loaded.front().is_whole);
  EXPECT_TRUE(same_slab(to.data(), test_name(0, 0)));
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOnline);
}

TEST_F(NvmeTierTest, ALoadIsGivenUpWhereAllBuffersAreOut) {
  const auto depth = static_cast<std::uint32_t>(NvmeTier::depth(kTestModel));
  TierOnFile disk(file, depth);
  for (std::uint32_t i = 0; i < depth; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  disk.device->fault = [](const IoOperation&) { return IoFault::kHeld; };
  std::vector<std::byte> to(kTestModel.slab_bytes());
  for (std::uint32_t i = 0; i < depth; ++i) {
    disk.tier->load(test_name(0, i), to.data(), disk.now);
  }
  disk.wait(seconds(1));
  EXPECT_EQ(disk.finish().size(), depth);

  disk.wait(seconds(1));
  ASSERT_TRUE(disk.tier->has(test_name(0, 0), disk.now)) << "it is tried again";
  disk.tier->load(test_name(0, 0), to.data(), disk.now);
  ASSERT_TRUE(disk.tier->deadline());
  const auto loaded = disk.finish();
  ASSERT_EQ(loaded.size(), 1U);
  EXPECT_FALSE(loaded.front().is_whole);
  EXPECT_FALSE(disk.tier->has(test_name(0, 0), disk.now)) << "the next pause has begun";

  disk.device->fault = nullptr;
  disk.device->release_held();
  disk.finish();
  disk.wait(seconds(2));
  EXPECT_TRUE(disk.load(test_name(0, 0)));
}

// ---- slots that are lent ------------------------------------------------------------------------

TEST_F(NvmeTierTest, WhatCanNotBeLentCostsNoSlab) {
  TierOnFile disk(file, 6);
  const auto lent = disk.tier->lend(2, disk.now);
  ASSERT_TRUE(lent);
  for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  EXPECT_FALSE(disk.tier->lend(5, disk.now)) << "one is free, and three would give way";
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(disk.load(test_name(0, i))) << i;
  EXPECT_EQ(disk.tier->stat().evictions, 0);
  const std::vector borrowed{disk.tier->borrow(test_name(0, 1))};
  EXPECT_FALSE(disk.tier->lend(4, disk.now));
  disk.tier->take_back(borrowed);
  EXPECT_TRUE(disk.tier->lend(4, disk.now));
  EXPECT_EQ(disk.tier->stat().slabs_held, 0);
  disk.tier->check();
}

TEST_F(NvmeTierTest, WhatIsBorrowedStaysBetweenWhatGivesWay) {
  TierOnFile disk(file, 4);
  for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  const std::vector borrowed{disk.tier->borrow(test_name(0, 1))};
  EXPECT_TRUE(disk.tier->lend(3, disk.now));  // one is free
  EXPECT_EQ(disk.tier->stat().evictions, 2);
  EXPECT_TRUE(disk.load(test_name(0, 1)));
  disk.tier->take_back(borrowed);
  disk.tier->check();
}

// The header is written behind, whether or not its holder is there still.
TEST_F(NvmeTierTest, WhatIsLentIsPublishedInPlace) {
  TierOnFile disk(file, 2);
  const auto lent = disk.tier->lend(1, disk.now).value();
  const auto filled = fill_slot(disk, lent[0], test_name(0, 1));
  disk.device->fault = [](const IoOperation&) { return IoFault::kHeld; };
  disk.tier->publish(test_name(0, 1), filled, disk.now);
  disk.tier->publish(test_name(0, 2), filled, disk.now);  // a slot has one name
  EXPECT_FALSE(disk.tier->has(test_name(0, 1), disk.now));
  disk.tier->take_back(lent);
  EXPECT_FALSE(disk.tier->lend(2, disk.now)) << "its header is under way";
  disk.device->fault = nullptr;
  disk.device->release_held();
  disk.finish();
  EXPECT_TRUE(disk.load(test_name(0, 1)));
  EXPECT_FALSE(disk.load(test_name(0, 2)));
  EXPECT_TRUE(disk.tier->lend(2, disk.now)) << "it gives way like any other";
}

TEST_F(NvmeTierTest, WhatIsRefutedBeforeItHasItsHeaderIsNotFound) {
  TierOnFile disk(file, 2);
  const auto lent = disk.tier->lend(1, disk.now).value();
  disk.device->fault = [](const IoOperation&) { return IoFault::kHeld; };
  disk.tier->publish(test_name(0, 1), fill_slot(disk, lent[0], test_name(0, 1)), disk.now);
  disk.tier->refute(lent[0], disk.now);
  disk.device->fault = nullptr;
  disk.device->release_held();
  disk.finish();
  EXPECT_FALSE(disk.tier->knows(test_name(0, 1)));
  EXPECT_TRUE(disk.store(test_name(0, 1))) << "the same comes anew, elsewhere";
  EXPECT_FALSE(disk.tier->lend(2, disk.now)) << "its holder has it still";
  disk.tier->take_back(lent);
  EXPECT_TRUE(disk.load(test_name(0, 1)));
  EXPECT_TRUE(disk.tier->lend(2, disk.now));
}

// While a slab is read it is refuted, and comes anew in another slot: the first one's end is
// nothing to that.
TEST_F(NvmeTierTest, AReadThatFailsForgetsItsOwnSlotAlone) {
  for (const bool is_cut_off : {false, true}) {
    file.clear();
    TierOnFile disk(file, 2);
    const SlabName name = test_name(0, 1);
    ASSERT_TRUE(disk.store(test_name(0, 0)) && disk.store(name));
    const SlotIndex first = disk.tier->borrow(name);
    ASSERT_EQ(first, SlotIndex{1});
    disk.device->fault = [](const IoOperation&) { return IoFault::kHeld; };
    std::vector<std::byte> to(kTestModel.slab_bytes());
    disk.tier->load(name, to.data(), disk.now);
    disk.tier->refute(first, disk.now);
    disk.device->fault = nullptr;
    ASSERT_TRUE(disk.store(name));
    const std::uint64_t at = disk.contents.superblock.geometry.slab_offset(first);
    if (is_cut_off) {
      file.resize(at);
    } else {
      file[at] ^= std::byte{1};
    }
    disk.device->release_held();
    const auto loaded = disk.finish();
    ASSERT_EQ(loaded.size(), 1U);
    EXPECT_FALSE(loaded.front().is_whole);
    EXPECT_TRUE(disk.load(name)) << is_cut_off;
  }
}

// Who has a slot writes runs to it, and leaves header and table, which are whole still.
TEST_F(NvmeTierTest, WhatWasLentDoesNotComeBackUnderItsOldName) {
  {
    TierOnFile disk(file, 3);
    for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  }
  for (int start = 0; start < 2; ++start) {  // by a store that has not written them itself, too
    TierOnFile disk(file, 3);
    EXPECT_EQ(disk.tier->stat().slabs_held, 3 - start);
    ASSERT_TRUE(disk.tier->lend(start == 0 ? 1 : 2, disk.now));  // one that has a name
    disk.finish();
  }
  TierOnFile disk(file, 3);
  EXPECT_EQ(disk.tier->stat().slabs_held, 1);
  EXPECT_EQ(disk.tier->stat().checksum_failures, 0);
  EXPECT_TRUE(disk.load(test_name(0, 2)));
}

// A header that this store can't read may be a newer one's, and all of them may be.
TEST_F(NvmeTierTest, WhatWasLentDoesNotComeBackToAStoreThatReadsIt) {
  std::byte* version = nullptr;
  {
    TierOnFile disk(file, 1);
    ASSERT_TRUE(disk.store(test_name(0, 1)));
    const NvmeGeometry& geometry = disk.contents.superblock.geometry;
    version = file.data() + geometry.header_offset(SlotIndex{0}) + 8;
  }
  *version ^= std::byte{64};
  {
    TierOnFile disk(file, 1);
    EXPECT_EQ(disk.tier->stat().checksum_failures, 1);
    ASSERT_TRUE(disk.tier->lend(1, disk.now));
    disk.finish();
  }
  *version ^= std::byte{64};
  EXPECT_FALSE(TierOnFile(file, 1).tier->knows(test_name(0, 1)));
}

TEST_F(NvmeTierTest, WhatWasRefutedDoesNotComeBackEither) {
  {
    TierOnFile disk(file, 3);
    ASSERT_TRUE(disk.store(test_name(0, 1)) && disk.store(test_name(0, 2)));
    const std::vector borrowed{disk.tier->borrow(test_name(0, 1))};
    disk.tier->refute(borrowed[0], disk.now);
    disk.tier->take_back(borrowed);
    disk.finish();
    EXPECT_TRUE(disk.tier->lend(2, disk.now));
  }
  EXPECT_EQ(TierOnFile(file, 3).tier->stat().slabs_held, 1);
}

TEST_F(NvmeTierTest, ASlotsOldHeaderGoesBeforeItsNewOneComes) {
  {
    TierOnFile disk(file, 1);
    ASSERT_TRUE(disk.store(test_name(0, 1)));
    disk.device->fault = [](const IoOperation&) { return IoFault::kHeld; };
    const auto lent = disk.tier->lend(1, disk.now).value();
    disk.tier->publish(test_name(0, 2), fill_slot(disk, lent[0], test_name(0, 2)), disk.now);
    disk.device->fault = nullptr;
    disk.finish();
    EXPECT_FALSE(disk.tier->has(test_name(0, 2), disk.now));
    disk.device->release_held();
    disk.finish();
    EXPECT_TRUE(disk.load(test_name(0, 2)));
  }
  EXPECT_TRUE(TierOnFile(file, 1).load(test_name(0, 2)));
}

TEST_F(NvmeTierTest, WhatCanNotBePublishedIsFreeWhenItsHolderLeaves) {
  TierOnFile disk(file, 2);
  const auto lent = disk.tier->lend(1, disk.now).value();
  disk.device->fault = [](const IoOperation&) { return IoFault::kError; };
  disk.tier->publish(test_name(0, 1), fill_slot(disk, lent[0], test_name(0, 1)), disk.now);
  disk.finish();
  EXPECT_FALSE(disk.tier->knows(test_name(0, 1)));
  EXPECT_FALSE(disk.tier->lend(2, disk.now));
  disk.tier->take_back(lent);
  EXPECT_TRUE(disk.tier->lend(2, disk.now));
}

// ---- all the time -------------------------------------------------------------------------------

TEST_F(NvmeTierTest, DamageIsFoundBeforeItIsAskedFor) {
  TierOnFile disk(file, 4);
  for (std::uint32_t i = 0; i < 3; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  const NvmeGeometry geometry{kTestModel.slab_bytes(), 4};
  file[geometry.slab_offset(SlotIndex{1}) + 10] ^= std::byte{1};
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(disk.tier->deadline());
    disk.now = *disk.tier->deadline();
    EXPECT_TRUE(disk.finish().empty());
  }
  EXPECT_FALSE(disk.tier->knows(test_name(0, 1)));
  EXPECT_TRUE(disk.tier->knows(test_name(0, 0)) && disk.tier->knows(test_name(0, 2)));
  EXPECT_EQ(disk.tier->stat().checksum_failures, 1);
  EXPECT_EQ(disk.tier->stat().slabs_read, 0);
  EXPECT_EQ(disk.tier->stat().bytes_read, 0);
}

TEST_F(NvmeTierTest, MoreLoadsThanBuffersAllEnd) {
  constexpr std::uint32_t kCount = 100;
  TierOnFile disk(file, kCount);
  std::vector<std::vector<std::byte>> slabs(kCount,
                                            std::vector<std::byte>(kTestModel.slab_bytes()));
  for (std::uint32_t i = 0; i < kCount; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  for (std::uint32_t i = 0; i < kCount; ++i) {
    disk.tier->load(test_name(0, i), slabs[i].data(), disk.now);
  }
  EXPECT_FALSE(disk.tier->can_store(disk.now)) << "reads go first";
  EXPECT_EQ(disk.finish().size(), kCount);
  for (std::uint32_t i = 0; i < kCount; ++i) {
    EXPECT_TRUE(same_slab(slabs[i].data(), test_name(0, i))) << i;
  }
  EXPECT_TRUE(disk.tier->can_store(disk.now));
}

TEST_F(NvmeTierTest, AFileOfFewSlotsIsRefused) {
  const NvmeGeometry small{kTestModel.slab_bytes(), 0};
  EXPECT_EQ(NvmeGeometry::fit(small.file_bytes(), small.slot_bytes).num_slots, 0U);
  EXPECT_EQ(NvmeGeometry::fit(0, small.slot_bytes).num_slots, 0U);
  EXPECT_THROW(TierOnFile(file, 0), Exception);
  EXPECT_NO_THROW(TierOnFile(file, 1).store(test_name(0, 1)));
}

}  // namespace
}  // namespace foretoken::kvstore
