// resolve against what device.h promises of it, under random traffic: who is resident, where, who
// had to go and what is to be fetched. The properties hold for any device's resolver.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <vector>

#include "kernels/device.h"
#include "tests/kernels/kv_sequence.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261122;
using Residents = std::map<int, int>;  // block -> slot

class ResolveTest : public testing::Test {
 protected:
  ResolveTest()
      : device(make_cpu_device({1, 1 << 20})), stream(device->make_stream(StreamKind::kCompute)) {}

  void resolve(KvSequence& kv, SelectionTable& selection, FetchTable& fetches) {
    device->resolve({&kv.view, &selection.view, &fetches.view, 1, 0, kv.view.shape.num_layers},
                    *stream);
  }

  static Residents residents(KvSequence& kv, int layer, int head) {
    Residents found;
    for (int block = 0; block < kv.view.max_blocks; ++block) {
      if (kv.slot(layer, head, block) != kAbsent) found[block] = kv.slot(layer, head, block);
    }
    for (int slot = 0; slot < kv.view.num_slots; ++slot) {
      const int block = kv.block(layer, head, slot);
      if (block != kAbsent) {
        EXPECT_EQ(found.at(block), slot);
      }
    }
    return found;
  }

  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
};

std::set<int> always_resident(int length) {
  std::set<int> blocks;
  const int last = length / kBlockTokens;
  for (int block = 0; block <= std::min(3, last); ++block) blocks.insert(block);
  for (int token = std::max(0, length + 1 - kLocalTokens); token <= length; ++token) {
    blocks.insert(token / kBlockTokens);
  }
  return blocks;
}

std::set<int> needed_blocks(const SelectionTable& selection, std::size_t head, int length) {
  std::set<int> blocks = always_resident(length);
  for (int i = 0; i < selection.counts[head]; ++i) {
    const int block =
        selection.blocks[head * static_cast<std::size_t>(selection.view.max_selected) +
                         static_cast<std::size_t>(i)];
    if (block >= 0 && block <= length / kBlockTokens) blocks.insert(block);
  }
  return blocks;
}

std::vector<int> keys_without(const Residents& from, const std::set<int>& without) {
  std::vector<int> keys;
  for (const auto& [block, slot] : from) {
    if (!without.contains(block)) keys.push_back(block);
  }
  return keys;
}

void expect_step(const Residents& before, const Residents& after, const std::set<int>& needed,
                 std::span<const FetchEntry> fetched, int length, int num_slots) {
  const int num_blocks = length / kBlockTokens + 1;
  const int usable = std::min(num_slots, num_blocks);
  std::set<int> slots_in_use;
  for (const auto& [block, slot] : after) slots_in_use.insert(slot);
  ASSERT_EQ(slots_in_use.size(), after.size()) << "two blocks share a slot";
  EXPECT_LT(*slots_in_use.rbegin(), usable);
  for (const int block : needed) EXPECT_TRUE(after.contains(block)) << "block " << block;

  // Who stayed kept its slot; who went was not needed, and had no lower one left behind.
  std::vector<int> gone;
  for (const auto& [block, slot] : before) {
    if (after.contains(block)) {
      EXPECT_EQ(after.at(block), slot);
    } else {
      gone.push_back(block);
    }
  }
  const std::vector<int> candidates = keys_without(before, needed);
  ASSERT_LE(gone.size(), candidates.size());
  EXPECT_TRUE(std::equal(gone.begin(), gone.end(), candidates.begin()));

  std::map<int, int> expected_fetches;
  for (const auto& [block, slot] : after) {
    const bool has_bytes = block * kBlockTokens < length;
    if (!before.contains(block) && has_bytes) expected_fetches[block] = slot;
    EXPECT_TRUE(before.contains(block) || needed.contains(block));
  }
  std::map<int, int> fetches;
  for (const FetchEntry& entry : fetched) fetches[entry.block] = entry.slot;
  EXPECT_EQ(fetches, expected_fetches);
  EXPECT_EQ(fetches.size(), fetched.size());
}

void choose_randomly(SelectionTable& selection, std::mt19937& random, int length) {
  const int num_blocks = length / kBlockTokens + 1;
  for (auto& count : selection.counts) {
    count = static_cast<int>(random() % static_cast<unsigned>(selection.view.max_selected + 1));
  }
  for (auto& block : selection.blocks) {
    block = static_cast<int>(random() % static_cast<unsigned>(num_blocks));
    if (random() % 16 == 0) block = random() % 2 == 0 ? kAbsent : 1'000'000;  // ignored
  }
}

TEST_F(ResolveTest, KeepsItsPromisesUnderRandomTraffic) {
  std::mt19937 random(kSeed);
  const KvShape shape{2, 3, 8, DataType::kFp16};
  constexpr int kMaxSelected = 7;
  constexpr int kMaxBlocks = 64;
  constexpr int kNumSlots = 4 + 5 + kMaxSelected;
  for (const int start : {0, 1, 15, 16, 63, 64, 65, 500}) {
    KvSequence kv(shape, kNumSlots, kMaxBlocks);
    SelectionTable selection(shape, kMaxSelected);
    FetchTable fetches(shape, kNumSlots);
    for (kv.length = start; kv.length < std::min(start + 300, kMaxBlocks * kBlockTokens);
         ++kv.length) {
      std::map<std::pair<int, int>, Residents> before;
      for (int layer = 0; layer < 2; ++layer) {
        for (int head = 0; head < 3; ++head) before[{layer, head}] = residents(kv, layer, head);
      }
      choose_randomly(selection, random, kv.length);
      resolve(kv, selection, fetches);
      for (const auto& [place, residents_before] : before) {
        const std::size_t head = kv.head(place.first, place.second);
        SCOPED_TRACE(testing::Message() << "length " << kv.length << " head " << head);
        expect_step(residents_before, residents(kv, place.first, place.second),
                    needed_blocks(selection, head, kv.length),
                    {fetches.entries.data() + head * kNumSlots,
                     static_cast<std::size_t>(fetches.counts[head])},
                    kv.length, kNumSlots);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(ResolveTest, LeavesNoHoles) {
  std::mt19937 random(kSeed);
  const KvShape shape{1, 1, 8, DataType::kFp16};
  KvSequence kv(shape, 12, 40);
  SelectionTable selection(shape, 3);
  FetchTable fetches(shape, 12);
  for (kv.length = 0; kv.length < 40 * kBlockTokens; ++kv.length) {
    choose_randomly(selection, random, kv.length);
    resolve(kv, selection, fetches);
    const int num_blocks = kv.length / kBlockTokens + 1;
    for (int slot = 0; slot < std::min(12, num_blocks); ++slot) {
      ASSERT_NE(kv.block(0, 0, slot), kAbsent) << "length " << kv.length << " slot " << slot;
    }
  }
}

// With room for every block nothing is chosen: all are resident, block b in slot b.
TEST_F(ResolveTest, IsTheIdentityWhenEverythingFits) {
  const KvShape shape{1, 2, 8, DataType::kFp16};
  KvSequence kv(shape, 40, 40);
  SelectionTable nothing(shape, 1);
  FetchTable fetches(shape, 40);
  kv.length = 20 * kBlockTokens + 5;  // a reused or packed prefix
  resolve(kv, nothing, fetches);
  EXPECT_EQ(fetches.counts[0], 21);
  for (; kv.length < 40 * kBlockTokens; ++kv.length) {
    resolve(kv, nothing, fetches);
    for (int block = 0; block <= kv.length / kBlockTokens; ++block) {
      ASSERT_EQ(kv.slot(0, 1, block), block);
    }
    ASSERT_EQ(kv.slot(0, 1, 39), kv.length / kBlockTokens == 39 ? 39 : kAbsent);
    ASSERT_EQ(fetches.counts[1], 0) << "births need no bytes";
  }
}

// Sink and local are served before the selection when slots or the fetch list run short.
TEST_F(ResolveTest, DropsTheSelectionFirstWhenShort) {
  const KvShape shape{1, 1, 8, DataType::kFp16};
  KvSequence kv(shape, 10, 64);
  SelectionTable selection(shape, 6);
  selection.counts[0] = 6;
  selection.blocks = {10, 11, 12, 13, 14, 15};
  kv.length = 640;
  FetchTable fetches(shape, 10);
  resolve(kv, selection, fetches);
  const Residents found = residents(kv, 0, 0);
  EXPECT_EQ(found.size(), 10U);
  for (const int block : always_resident(kv.length)) EXPECT_TRUE(found.contains(block)) << block;
  EXPECT_TRUE(found.contains(10));
  EXPECT_FALSE(found.contains(11));

  KvSequence other(shape, 20, 64);
  other.length = 640;
  FetchTable short_list(shape, 8);  // four of the sink and four of the local window have bytes
  resolve(other, selection, short_list);
  EXPECT_EQ(short_list.counts[0], 8);
  for (const int block : always_resident(other.length)) {
    EXPECT_NE(other.slot(0, 0, block), kAbsent) << block;
  }
  EXPECT_EQ(other.slot(0, 0, 10), kAbsent);
}

// A block that gather found corrupt leaves a hole; the next resolve fills it and asks again.
TEST_F(ResolveTest, FillsAHole) {
  const KvShape shape{1, 1, 8, DataType::kFp16};
  KvSequence kv(shape, 10, 64);
  SelectionTable selection(shape, 1);
  FetchTable fetches(shape, 10);
  kv.length = 640;
  resolve(kv, selection, fetches);
  const int slot = kv.slot(0, 0, 2);
  kv.slot(0, 0, 2) = kAbsent;
  kv.block(0, 0, slot) = kAbsent;
  resolve(kv, selection, fetches);
  EXPECT_EQ(kv.slot(0, 0, 2), slot);
  ASSERT_EQ(fetches.counts[0], 1);
  EXPECT_EQ(fetches.entries[0].block, 2);
}

}  // namespace
}  // namespace foretoken::kernels
