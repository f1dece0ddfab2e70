// An outsized sequence against a plain copy of its KV, on a disk that a test can damage.
#include "kvstore/outsized_kv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string_view>
#include <thread>
#include <utility>

#include "kernels/checksum.h"
#include "kvstore/internal/run_io.h"
#include "kvstore/internal/sealed_slab.h"
#include "kvstore/internal/sealing_device.h"
#include "kvstore/internal/slot_table.h"
#include "tests/kvstore/memory_device.h"

namespace foretoken::kvstore {
namespace {

using kernels::KvShape;

constexpr KvShape kShape{.num_layers = 6, .num_kv_heads = 2, .head_dim = 64};
constexpr int kSegments = 9;
constexpr unsigned kSeed = 7;

class OutsizedKvTest : public ::testing::Test {
 protected:
  OutsizedKvTest()
      : num_frames_(OutsizedKv::least_frames(kShape, kSegments)),
        memory_(num_frames_ * kShape.run_bytes()) {
    seal_with(nullptr);
  }

  // Begins anew, on a disk that is encrypted; null: it is not.
  void seal_with(const std::shared_ptr<const KvCipher>& cipher) {
    kv_.reset();
    auto disk = std::make_unique<MemoryDevice>(file_);
    disk_ = disk.get();
    io_ = std::make_unique<RunIo>(IoMemory(RunIo::kDepth * kShape.run_bytes()),
                                  make_sealing_device(std::move(disk), cipher), kShape.run_bytes());
    is_sealed_ = cipher != nullptr;
    kv_ = std::make_unique<OutsizedKv>(*device_, *io_, nullptr, parts());
  }

  OutsizedKv::Parts parts() {
    OutsizedKv::Parts parts{kShape, kSegments, {}, {}, is_sealed_};
    for (std::size_t i = 0; i < num_frames_; ++i) {
      std::byte* frame = memory_.data() + i * kShape.run_bytes();
      parts.frames.push_back({frame, frame});
    }
    for (std::uint64_t i = kShape.num_kv_heads * kSegments; i > 0; --i) {  // in any order
      parts.slots.push_back(4096 + i * slot_bytes(kShape, is_sealed_));
    }
    return parts;
  }

  static std::size_t index(int layer, HeadSegment run) {
    return static_cast<std::size_t>((layer * kShape.num_kv_heads + run.head) * kSegments +
                                    run.segment);
  }

  // As an op would: any bytes, and their checksums.
  void write(int layer, HeadSegment run) {
    std::byte* at = kv_->runs()[index(layer, run)];
    ASSERT_NE(at, nullptr);
    for (std::size_t i = 0; i < kShape.run_bytes(); i += 4) {
      const auto word = static_cast<std::uint32_t>(random_());
      std::memcpy(at + i, &word, 4);
    }
    for (int block = 0; block < kSegmentBlocks; ++block) {
      kv_->checksums()[index(layer, run) * kSegmentBlocks + static_cast<std::size_t>(block)] =
          kernels::block_checksum(at + kernels::slab_block_offset(kShape, 0, block),
                                  kShape.block_bytes(), layer, block);
    }
    truth_[index(layer, run)].assign(at, at + kShape.run_bytes());
  }
  void fill(int layer, int segment) {
    ASSERT_TRUE(kv_->make_room(layer, {segment, segment + 1}));
    for (int head = 0; head < kShape.num_kv_heads; ++head) write(layer, {head, segment});
    kv_->fill(layer, {segment, segment + 1});
  }
  void fill_all() {
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      for (int segment = 0; segment < kSegments; ++segment) fill(layer, segment);
    }
  }
  bool is_right(int layer, HeadSegment run) {
    const std::byte* at = kv_->runs()[index(layer, run)];
    const auto& truth = truth_.at(index(layer, run));
    return at != nullptr && truth.size() == kShape.run_bytes() &&
           std::memcmp(truth.data(), at, truth.size()) == 0;
  }
  // All of the layer, as streamed attention wants it.
  void read_layer(int layer) {
    if (!kv_->wait(layer, Segments{0, kSegments})) return;
    for (int head = 0; head < kShape.num_kv_heads; ++head) {
      for (int segment = 0; segment < kSegments; ++segment) {
        EXPECT_TRUE(is_right(layer, {head, segment})) << layer << ' ' << head << ' ' << segment;
      }
    }
    kv_->let_go(layer);
  }
  void read_all() {
    for (int layer = 0; layer < kShape.num_layers && kv_->status(); ++layer) read_layer(layer);
  }

  std::mt19937 random_{kSeed};
  std::unique_ptr<kernels::Device> device_ = kernels::make_cpu_device({.num_threads = 1});
  FileBytes file_;
  std::size_t num_frames_;
  std::vector<std::byte> memory_;
  MemoryDevice* disk_ = nullptr;
  bool is_sealed_ = false;
  std::unique_ptr<RunIo> io_;
  std::unique_ptr<OutsizedKv> kv_;
  std::map<std::size_t, std::vector<std::byte>> truth_;
};

TEST_F(OutsizedKvTest, WhatLeftComesBackAsItWas) {
  fill_all();
  for (int round = 0; round < 3; ++round) read_all();
  ASSERT_TRUE(kv_->status());
  EXPECT_GT(kv_->bytes_read(), 0);
}

TEST_F(OutsizedKvTest, WhatALayerHoldsStays) {
  fill_all();
  for (int round = 0; round < 300; ++round) {
    std::map<int, std::vector<HeadSegment>> held;
    for (int layer = 0; layer < kShape.num_layers; ++layer) {
      std::vector<HeadSegment> runs;
      for (int i = 0; i < 4; ++i) {
        runs.push_back({static_cast<int>(random_() % 2), static_cast<int>(random_() % kSegments)});
      }
      const bool asked = kv_->ask(layer, runs);
      held[layer] = std::move(runs);
      if (!asked) break;  // too little room: the later layers wait for their turn
    }
    for (const auto& [layer, runs] : held) {
      ASSERT_TRUE(kv_->wait(layer, runs));
      for (const HeadSegment& run : runs) ASSERT_TRUE(is_right(layer, run)) << round;
    }
    read_layer(static_cast<int>(random_() % kShape.num_layers));
    for (const auto& [layer, runs] : held) kv_->let_go(layer);
  }
  ASSERT_TRUE(kv_->status());
}

// As prefill over a reused prefix does, with the fewest frames: while a layer's last segment is
// filled, the disk brings the next layer's prefix, and all of it has room.
TEST_F(OutsizedKvTest, TheNextLayerIsReadBesideOneThatIsFilled) {
  constexpr Segments kPrefix{0, kSegments - 1};
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    for (int segment = 0; segment < kPrefix.end; ++segment) fill(layer, segment);
  }
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    ASSERT_TRUE(kv_->wait(layer, kPrefix));
    kv_->let_go(layer);
    const bool is_last = layer + 1 == kShape.num_layers;
    EXPECT_TRUE(is_last || kv_->ask(layer + 1, kPrefix));
    for (int i = 0; i < 100; ++i) kv_->advance();
    fill(layer, kPrefix.end);
    for (int segment = 0; !is_last && segment < kPrefix.end; ++segment) {
      EXPECT_TRUE(is_right(layer + 1, {0, segment}) && is_right(layer + 1, {1, segment}));
    }
  }
  read_all();
  EXPECT_TRUE(kv_->status());
}

// Scores say what stays, and what comes back before anybody asks for it.
TEST_F(OutsizedKvTest, WhatScoresHighestIsInMemory) {
  fill_all();
  for (int round = 0; round < 3; ++round) {
    std::vector<std::size_t> best;
    for (int i = 0; i < 12; ++i) best.push_back(random_() % truth_.size());
    std::fill_n(kv_->scores(), truth_.size(), 0.5F);
    for (const std::size_t run : best) kv_->scores()[run] = 0.9F;
    kv_->promote();
    io_->wait();
    kv_->show_arrived();
    for (const std::size_t run : best) EXPECT_NE(kv_->runs()[run], nullptr) << run;
    read_all();  // whatever is read beside them
    for (const std::size_t run : best) EXPECT_NE(kv_->runs()[run], nullptr) << run;
  }
}

// Ops in flight read the tables: advance() adds nothing, and takes nothing that a layer holds.
TEST_F(OutsizedKvTest, WhatComesIsShownWhenItMay) {
  fill_all();
  read_all();
  const std::vector<HeadSegment> here{{0, 0}, {0, 1}, {1, 2}};
  const std::vector<HeadSegment> away{{0, 4}, {1, 5}, {1, 6}};
  ASSERT_TRUE(kv_->wait(0, here));
  kv_->let_go(0);
  for (const HeadSegment& run : away) ASSERT_FALSE(kv_->is_here(0, run));
  ASSERT_TRUE(kv_->ask(0, here) && kv_->ask(0, away));
  for (int i = 0; i < 100; ++i) kv_->advance(1);
  for (const HeadSegment& run : here) EXPECT_TRUE(is_right(0, run));
  for (const HeadSegment& run : away) EXPECT_FALSE(kv_->is_here(0, run));
  kv_->show_arrived();
  for (const HeadSegment& run : away) EXPECT_TRUE(is_right(0, run));
}

// A step that goes on without what is late asks again in the next: the disk reads for that one.
TEST_F(OutsizedKvTest, WhatNobodyHoldsAnyMoreIsNotRead) {
  fill_all();
  std::vector<HeadSegment> all;
  for (int segment = 0; segment < kSegments; ++segment) all.push_back({0, segment});
  ASSERT_TRUE(kv_->ask(0, all));
  kv_->let_go(0);
  kv_->drop_unheld();
  kv_->advance();
  EXPECT_EQ(kv_->bytes_read(), 0);
  read_all();
}

// The rank's buffers are for all of its sequences: one that finds none waits for another's.
TEST_F(OutsizedKvTest, AnotherSequenceMayHaveAllBuffers) {
  struct Other : RunIo::Owner {
    void on_read(RunIndex, const Result<std::span<const std::byte>>& bytes) override {
      if (bytes) ++num_read;
    }
    void on_written(RunIndex, const Result<Seal>&) override {}
    int num_read = 0;
  } other;
  fill_all();
  read_all();
  // In two halves each, so that none has ended when it is looked for first.
  disk_->fault = [](const IoOperation&) { return IoFault::kShort; };
  while (io_->can_read()) {
    io_->read(other, RunIndex{}, {4096 + kShape.slab_bytes(), kShape.run_bytes()}, {});
  }
  disk_->fault = nullptr;
  read_all();
  EXPECT_TRUE(kv_->status()) << kv_->status().error().message;
  EXPECT_EQ(other.num_read, RunIo::kDepth);
}

// A head's table that can't be written, and the next head's after that, as there was no buffer.
TEST_F(OutsizedKvTest, WhatCanNotBeWrittenWholeIsNotPublished) {
  struct Other : RunIo::Owner {
    void on_read(RunIndex, const Result<std::span<const std::byte>>&) override {}
    void on_written(RunIndex, const Result<Seal>&) override {}
  } other;
  fill_all();
  read_all();
  disk_->fault = [](const IoOperation&) { return IoFault::kHeld; };
  const std::uint64_t behind_slots =
      4096 + (kShape.num_kv_heads * kSegments + 1) * kShape.slab_bytes();
  for (int i = 1; i < RunIo::kDepth / 2; ++i) {
    io_->write(other, RunIndex{}, {behind_slots, kShape.run_bytes()});
  }
  disk_->fault = [](const IoOperation&) { return IoFault::kFull; };
  kv_->publish(0, PrefixKey{});  // one buffer: head 0's table
  kv_->advance();                // ... which fails
  disk_->fault = nullptr;
  disk_->release_held();
  kv_->advance();  // what is written shows that the disk has room again: head 1's table
  kv_->publish(1, PrefixKey{});
  kv_->finish_publishing(std::chrono::seconds(10));
  const auto published = kv_->take_published();
  ASSERT_EQ(published.size(), 1U);
  EXPECT_EQ(published[0].segment, 1);
  EXPECT_EQ(published[0].digests.size(), 2U);
  EXPECT_TRUE(kv_->status());
}

TEST_F(OutsizedKvTest, FaultsThatPassCostNothing) {
  disk_->fault = [this](const IoOperation&) {
    const unsigned dice = random_() % 40;
    return dice == 0 ? IoFault::kError : dice == 1 ? IoFault::kShort : IoFault::kNone;
  };
  fill_all();
  for (int round = 0; round < 3; ++round) read_all();
  ASSERT_TRUE(kv_->status());
}

TEST_F(OutsizedKvTest, AnEncryptedDiskGivesItBackAndHoldsNothingThatCanBeRead) {
  seal_with(KvCipher::random());
  int count = 0;  // short and failed operations, and so the same bytes again
  disk_->fault = [&](const IoOperation&) {
    ++count;
    return count % 7 == 0 ? IoFault::kShort : count % 11 == 0 ? IoFault::kError : IoFault::kNone;
  };
  fill_all();
  for (int round = 0; round < 3; ++round) read_all();
  ASSERT_TRUE(kv_->status()) << kv_->status().error().message;
  EXPECT_GT(kv_->bytes_read(), 0);
  const std::string_view disk(reinterpret_cast<const char*>(file_.data()), file_.size());
  for (const auto& [run, bytes] : truth_) {
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), 16);
    EXPECT_EQ(disk.find(text), std::string_view::npos) << run;
  }
}

// What is published is a slab as the store seals it, once its runs and tables were written in any
// order, some of them twice.
TEST_F(OutsizedKvTest, OfAnEncryptedDiskItPublishesSlabsThatOpen) {
  const auto cipher = KvCipher::random();
  seal_with(cipher);
  disk_->fault = [count = 0](const IoOperation&) mutable {
    return ++count % 5 == 0 ? IoFault::kError : IoFault::kNone;
  };
  fill_all();
  for (int segment = 0; segment < kSegments; ++segment) kv_->publish(segment, PrefixKey{});
  kv_->finish_publishing(std::chrono::seconds(10));
  const auto published = kv_->take_published();
  ASSERT_EQ(published.size(), static_cast<std::size_t>(kSegments));
  const auto slots = parts().slots;
  for (const auto& [segment, key, digests, seals] : published) {
    ASSERT_EQ(seals.size(), 2U);
    for (int head = 0; head < 2; ++head) {
      const std::uint64_t at = slots[static_cast<std::size_t>(head * kSegments + segment)];
      const std::span slab(file_.data() + at, slot_bytes(kShape, true));
      ASSERT_TRUE(open_slab(*cipher, kShape, slab, at, seals[static_cast<std::size_t>(head)]));
      for (int layer = 0; layer < kShape.num_layers; ++layer) {
        const auto run =
            slab.subspan(static_cast<std::size_t>(layer) * kShape.run_bytes(), kShape.run_bytes());
        EXPECT_TRUE(std::ranges::equal(run, truth_.at(index(layer, {head, segment}))));
      }
    }
  }
}

TEST_F(OutsizedKvTest, AChangedOrStaleRunOfAnEncryptedDiskIsSeen) {
  for (int round = 0; round < 6; ++round) {
    seal_with(KvCipher::random());
    fill_all();
    read_all();
    ASSERT_TRUE(kv_->status());
    const std::size_t run = kShape.run_bytes();
    const FileBytes before = file_;
    for (std::size_t at = 0; at + run <= file_.size(); at += run) {
      if (round % 2 == 0) {
        file_[at + random_() % run] ^= std::byte{1};
      } else if (at >= run) {  // each has its neighbour's bytes
        std::memcpy(file_.data() + at, before.data() + at - run, run);
      }
    }
    read_all();
    ASSERT_FALSE(kv_->status());
    EXPECT_EQ(kv_->status().error().code, ErrorCode::kCorrupt);
  }
}

// Whatever of the file is damaged: it is right, or known to be lost.
TEST_F(OutsizedKvTest, DamageIsSeen) {
  int seen = 0;
  for (int round = 0; round < 40; ++round) {
    kv_ = std::make_unique<OutsizedKv>(*device_, *io_, nullptr, parts());
    disk_->fault = [&, count = 0](const IoOperation& operation) mutable {
      if (operation.direction == IoDirection::kRead || ++count % 20 != round % 20) {
        return IoFault::kNone;
      }
      return round % 2 == 0 ? IoFault::kTorn : IoFault::kLost;
    };
    fill_all();
    if (round % 3 == 0) file_[random_() % file_.size()] ^= std::byte{8};
    read_all();
    const NvmeFaults faults = io_->take_faults();
    EXPECT_EQ(faults.io_errors, 0);
    EXPECT_EQ(faults.checksum_failures > 0, !kv_->status());
    if (kv_->status()) continue;
    EXPECT_EQ(kv_->status().error().code, ErrorCode::kCorrupt);
    ++seen;
  }
  EXPECT_GT(seen, 20);
}

TEST_F(OutsizedKvTest, ADeadDiskFailsTheSequenceAndSaysWhy) {
  fill_all();
  disk_->fault = [](const IoOperation&) { return IoFault::kError; };
  read_all();
  ASSERT_FALSE(kv_->status());
  EXPECT_EQ(kv_->status().error().code, ErrorCode::kIo);
  EXPECT_GT(io_->take_faults().io_errors, 0);
  EXPECT_EQ(io_->take_faults().io_errors, 0);
}

// A sector that stays bad: its sequence is lost, and nobody else's disk.
TEST_F(OutsizedKvTest, ABadSectorCostsItsSequenceAlone) {
  fill_all();
  const std::uint64_t bad = parts().slots[5] + kShape.run_bytes();
  disk_->fault = [bad](const IoOperation& operation) {
    return operation.offset == bad ? IoFault::kError : IoFault::kNone;
  };
  while (io_->is_busy()) io_->wait();  // so that nothing ends between its tries
  const std::vector<HeadSegment> run{{0, 5}};
  ASSERT_FALSE(kv_->is_here(1, run[0]));
  ASSERT_FALSE(kv_->wait(1, run));
  EXPECT_EQ(kv_->status().error().code, ErrorCode::kIo);
  EXPECT_EQ(kv_->take_refuted(), (std::vector<HeadSegment>{{0, 5}}));
  EXPECT_TRUE(io_->can_read() && io_->can_write());
  kv_ = std::make_unique<OutsizedKv>(*device_, *io_, nullptr, parts());
  disk_->fault = nullptr;
  fill_all();
  read_all();
  EXPECT_TRUE(kv_->status());
}

// What a disk that fails does not give is not refuted: it may be whole.
TEST_F(OutsizedKvTest, ATableThatIsNotReadRefutesNoSlot) {
  constexpr KvShape kSlab{.num_layers = 6, .num_kv_heads = 1, .head_dim = 64};
  const NvmeGeometry geometry{slot_bytes(kSlab, false), 4};
  const SlotFile slots{kSlab, geometry.slab_offset(SlotIndex{0}), 7, nullptr};
  file_.resize(geometry.file_bytes());
  SlotTable table(kSlab, false);
  std::vector<NamedSlot> named;
  for (std::uint32_t i = 0; i < 4; ++i) {
    named.push_back({SlotIndex{i}, {0, PrefixKey{}}});
    const SlotHeader header{named[i].slot, 7, 1, i, table.digest(), named[i].name, {}};
    encode(header,
           std::span(file_).subspan(geometry.header_offset(header.slot)).first<kSectorBytes>());
  }
  named[1].name.head = 1;
  disk_->fault = [&](const IoOperation& operation) {
    return operation.offset == geometry.header_offset(SlotIndex{2}) ? IoFault::kError
                                                                    : IoFault::kNone;
  };
  const auto tables = read_tables(*io_, slots, named);
  EXPECT_TRUE(tables[0] && tables[3]);
  EXPECT_EQ(tables[1].error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(tables[2].error().code, ErrorCode::kIo);
  EXPECT_TRUE(refutes_slot(tables[1].error()) && refutes_slot(tables[2].error()));

  disk_->fault = [](const IoOperation&) { return IoFault::kError; };
  for (int i = 0; i < 3; ++i)
    static_cast<void>(read_tables(*io_, slots, std::span(named).first(1)));
  const auto none = read_tables(*io_, slots, named);
  ASSERT_EQ(none.size(), 4U);
  for (const auto& one : none) {
    ASSERT_FALSE(one);
    EXPECT_FALSE(refutes_slot(one.error())) << one.error().message;
  }
}

TEST_F(OutsizedKvTest, AFullFileSystemFailsTheSequence) {
  disk_->fault = [](const IoOperation&) { return IoFault::kFull; };
  for (int layer = 0; layer < kShape.num_layers && kv_->status(); ++layer) {
    static_cast<void>(kv_->make_room(layer, {0, kSegments}));
    for (int segment = 0; segment < kSegments && kv_->status(); ++segment) {
      for (int head = 0; head < kShape.num_kv_heads; ++head) write(layer, {head, segment});
    }
    kv_->fill(layer, {0, kSegments});
  }
  ASSERT_FALSE(kv_->status());
  EXPECT_EQ(kv_->status().error().code, ErrorCode::kExhausted);
}

// What is opened on its way ends when somebody looks a second time: a rank that has computed
// meanwhile has not looked at all.
TEST_F(OutsizedKvTest, TimeInWhichNobodyLookedIsNotTheDisks) {
  seal_with(KvCipher::random());
  fill_all();
  while (io_->is_busy()) io_->wait();
  std::vector<HeadSegment> away;
  for (int segment = 0; segment < kSegments; ++segment) {
    if (!kv_->is_here(0, {0, segment})) away.push_back({0, segment});
  }
  ASSERT_FALSE(away.empty());
  ASSERT_TRUE(kv_->ask(0, away));
  kv_->advance(0);
  std::this_thread::sleep_for(RunIo::kStallLimit + std::chrono::milliseconds(100));
  ASSERT_TRUE(kv_->wait(0, away)) << kv_->status().error().message;
  for (const HeadSegment& run : away) EXPECT_TRUE(is_right(0, run));
  EXPECT_EQ(io_->take_faults().io_errors, 0);
}

// A rank that ends a sequence beside others waits for a fraction of a step, whatever the disk does.
TEST_F(OutsizedKvTest, WhatIsPublishedIsWaitedForNoLongerThanSaid) {
  fill_all();
  disk_->fault = [](const IoOperation&) { return IoFault::kHeld; };
  kv_->publish(0, PrefixKey{});
  const auto begin = std::chrono::steady_clock::now();
  kv_->finish_publishing(std::chrono::milliseconds(50));
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(took, std::chrono::milliseconds(50));
  EXPECT_LT(took, RunIo::kStallLimit / 2);
  EXPECT_TRUE(kv_->status()) << "that it took no longer is no fault of the disk";
  EXPECT_EQ(io_->take_faults().io_errors, 0);
  disk_->fault = nullptr;
  disk_->release_held();
  kv_->finish_publishing(std::chrono::seconds(10));
  EXPECT_EQ(kv_->take_published().size(), 1U);
}

TEST_F(OutsizedKvTest, ADiskThatStandsStillIsWaitedForOnce) {
  fill_all();
  disk_->fault = [](const IoOperation&) { return IoFault::kHeld; };
  const auto begin = std::chrono::steady_clock::now();
  read_all();
  ASSERT_FALSE(kv_->status());
  EXPECT_EQ(kv_->status().error().code, ErrorCode::kTimeout);
  EXPECT_EQ(io_->take_faults().io_errors, 1);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 2 * RunIo::kStallLimit);
  kv_.reset();  // does not wait for what never ends
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 2 * RunIo::kStallLimit);
  disk_->release_held();
}

}  // namespace
}  // namespace foretoken::kvstore
