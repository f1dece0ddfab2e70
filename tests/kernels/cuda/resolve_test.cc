// resolve on the CUDA device against the CPU device under random traffic: the same tables, the
// same fetch lists, entry for entry. Then select_recent and select_top, which feed it.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <limits>
#include <random>
#include <vector>

#include "tests/kernels/cuda/device_sequence.h"

namespace foretoken::kernels {
namespace {

constexpr unsigned kSeed = 20261123;

struct Traffic {
  const char* name;
  int num_layers;
  int num_kv_heads;
  int num_slots;
  int max_blocks;
  int max_selected;
  int max_entries;
  int start;  // tokens of the first sequence; each further one has 37 more
  int steps;
  int rows;
};
void PrintTo(const Traffic& traffic, std::ostream* out) { *out << traffic.name; }

// The rows of one device.
struct Rows {
  Rows(DeviceUnderTest& device, const Traffic& t)
      : on(device), shape{t.num_layers, t.num_kv_heads, 8, DataType::kFp16} {
    std::vector<SequenceKv> kv;
    std::vector<Selection> chosen;
    std::vector<FetchList> lists;
    for (int row = 0; row < t.rows; ++row) {
      sequences.emplace_back(device, shape, t.num_slots, t.max_blocks);
      selections.emplace_back(device, shape, t.max_selected);
      fetches.emplace_back(device, shape, t.max_entries);
      sequences.back().length.set({t.start + 37 * row});
      kv.push_back(sequences.back().kv);
      chosen.push_back(selections.back().selection);
      lists.push_back(fetches.back().list);
    }
    device_kv = std::make_unique<DeviceArray<SequenceKv>>(device, kv);
    device_selections = std::make_unique<DeviceArray<Selection>>(device, chosen);
    device_fetches = std::make_unique<DeviceArray<FetchList>>(device, lists);
  }
  void resolve(int first_layer, int num_layers) {
    on.run(&Device::resolve,
           ResolveArgs{device_kv->data(), device_selections->data(), device_fetches->data(),
                       static_cast<int>(sequences.size()), first_layer, num_layers});
  }
  void advance() {
    on.run(&Device::advance, AdvanceArgs{device_kv->data(), static_cast<int>(sequences.size())});
  }

  DeviceUnderTest& on;
  KvShape shape;
  std::deque<DeviceSequence> sequences;
  std::deque<DeviceSelection> selections;
  std::deque<DeviceFetches> fetches;
  std::unique_ptr<DeviceArray<SequenceKv>> device_kv;
  std::unique_ptr<DeviceArray<Selection>> device_selections;
  std::unique_ptr<DeviceArray<FetchList>> device_fetches;
};

// Mostly blocks of the sequence, sorted or not, some twice; now and then one that isn't there.
std::vector<std::int32_t> random_blocks(std::mt19937& random, std::size_t count, int length) {
  const auto num_blocks = static_cast<unsigned>(length / kBlockTokens + 1);
  std::vector<std::int32_t> blocks(count);
  for (auto& block : blocks) {
    block = static_cast<int>(random() % num_blocks);
    if (random() % 32 == 0) block = random() % 2 == 0 ? kAbsent : 1'000'000;
  }
  if (random() % 2 == 0) std::sort(blocks.begin(), blocks.end());
  return blocks;
}

// What a failed check leaves behind.
void make_hole(DeviceSequence& sequence, std::size_t at) {
  const std::int32_t slot = sequence.block_to_slot[at];
  if (slot == kAbsent) return;
  const std::size_t head = at / static_cast<std::size_t>(sequence.kv.max_blocks);
  sequence.block_to_slot[at] = kAbsent;
  sequence.slot_to_block[head * static_cast<std::size_t>(sequence.kv.num_slots) +
                         static_cast<std::size_t>(slot)] = kAbsent;
}

class Resolve : public CudaTest, public testing::WithParamInterface<Traffic> {};

TEST_P(Resolve, IsTheCpusEntryForEntry) {
  const Traffic& t = GetParam();
  Pair pair;
  Rows cuda(pair.cuda, t);
  Rows cpu(pair.cpu, t);
  std::mt19937 random(kSeed);
  for (int step = 0; step < t.steps; ++step) {
    SCOPED_TRACE(testing::Message() << "step " << step);
    for (std::size_t row = 0; row < cpu.sequences.size(); ++row) {
      const auto blocks = random_blocks(random, entries_of(cpu.shape, t.max_selected),
                                        cpu.sequences[row].length.get()[0]);
      std::vector<std::int32_t> counts(entries_of(cpu.shape, 1));
      for (auto& count : counts) {
        count = static_cast<int>(random() % static_cast<unsigned>(t.max_selected + 1));
      }
      const bool damaged = random() % 8 == 0;
      const std::size_t hole = random();
      for (Rows* rows : {&cuda, &cpu}) {
        rows->selections[row].blocks.set(blocks);
        rows->selections[row].counts.set(counts);
        DeviceSequence& sequence = rows->sequences[row];
        if (!damaged) continue;
        sequence.download();
        for (std::size_t i = 0; i < 5; ++i) {
          make_hole(sequence, (hole + i * 7) % sequence.block_to_slot.size());
        }
        sequence.upload();
      }
    }
    const int first_layer = step % 3 == 2 ? t.num_layers - 1 : 0;
    for (Rows* rows : {&cuda, &cpu}) {
      rows->resolve(first_layer, t.num_layers - first_layer);
      for (DeviceSequence& sequence : rows->sequences) sequence.download();
    }
    for (std::size_t row = 0; row < cpu.sequences.size(); ++row) {
      ASSERT_EQ(cuda.fetches[row].listed(), cpu.fetches[row].listed()) << "row " << row;
      ASSERT_EQ(cuda.fetches[row].totals.get(), cpu.fetches[row].totals.get());
      ASSERT_EQ(cuda.sequences[row].block_to_slot, cpu.sequences[row].block_to_slot);
      ASSERT_EQ(cuda.sequences[row].slot_to_block, cpu.sequences[row].slot_to_block);
    }
    cuda.advance();
    cpu.advance();
    ASSERT_EQ(cuda.sequences.back().length.get(), cpu.sequences.back().length.get());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Resolve,
    testing::Values(Traffic{"from nothing", 2, 3, 16, 64, 7, 16, 0, 300, 2},
                    Traffic{"victims at once", 1, 9, 16, 64, 7, 16, 500, 300, 3},
                    Traffic{"too few slots", 1, 1, 6, 64, 12, 6, 300, 200, 1},
                    Traffic{"short fetch lists", 2, 2, 40, 300, 31, 5, 2000, 200, 2},
                    Traffic{"more wanted than threads", 1, 2, 700, 1500, 690, 700, 20000, 60, 1},
                    Traffic{"128K", 1, 2, 200, 8192, 191, 200, 130800, 60, 1},
                    Traffic{"1M", 1, 1, 200, 65536, 191, 200, 1048300, 30, 1},
                    Traffic{"all resident", 2, 9, 64, 64, 1, 64, 0, 400, 2},
                    Traffic{"all resident, short fetch lists", 1, 2, 64, 64, 1, 3, 700, 200, 1},
                    Traffic{"all resident, 128K", 1, 2, 8192, 8192, 1, 8192, 130800, 60, 1}));

class ResolveNothing : public CudaTest {};
TEST_F(ResolveNothing, TakesNoRowsAndNoLayers) {
  Pair pair;
  Rows cuda(pair.cuda, {"", 1, 1, 16, 64, 7, 16, 100, 1, 1});
  pair.cuda.run(&Device::resolve, ResolveArgs{nullptr, nullptr, nullptr, 0, 0, 1});
  pair.cuda.run(&Device::advance, AdvanceArgs{nullptr, 0});
  cuda.resolve(0, 0);
  cuda.sequences[0].download();
  EXPECT_EQ(cuda.sequences[0].slot_to_block, std::vector<std::int32_t>(16, kAbsent));
}

class Select : public CudaTest {};

// What `select` chooses on one device, of sequences of several lengths.
template <typename SelectOp>
std::vector<std::vector<std::vector<std::int32_t>>> choose(DeviceUnderTest& on, SelectOp select) {
  const KvShape shape{3, 11, 8, DataType::kFp16};
  std::deque<DeviceSequence> sequences;
  std::deque<DeviceSelection> selections;
  std::vector<SequenceKv> kv;
  std::vector<Selection> chosen;
  for (const int length : {0, 100, 142, 143, 900, 30'000}) {
    sequences.emplace_back(on, shape, 4, 8);
    sequences.back().length.set({length});
    selections.emplace_back(on, shape, 1500);
    kv.push_back(sequences.back().kv);
    chosen.push_back(selections.back().selection);
  }
  const DeviceArray<SequenceKv> device_kv(on, kv);
  const DeviceArray<Selection> device_chosen(on, chosen);
  select(on, device_kv.data(), device_chosen.data(), static_cast<int>(kv.size()));
  std::vector<std::vector<std::vector<std::int32_t>>> all;
  for (const DeviceSelection& selection : selections) all.push_back(selection.chosen());
  return all;
}

TEST_F(Select, RecentAreTheCpus) {
  Pair pair;
  for (const int count : {0, 1, 50, 1500}) {
    const auto select = [&](DeviceUnderTest& on, auto* kv, auto* chosen, int rows) {
      on.run(&Device::select_recent, SelectRecentArgs{kv, chosen, rows, count});
    };
    EXPECT_EQ(choose(pair.cuda, select), choose(pair.cpu, select)) << count;
  }
}

TEST_F(Select, TracesAreTheCpus) {
  Pair pair;
  for (const int count : {0, 1, 50, 1500}) {
    const auto select = [&](DeviceUnderTest& on, auto* kv, auto* chosen, int rows) {
      on.run(&Device::select_trace, SelectTraceArgs{kv, chosen, rows, count, 0.08F});
    };
    EXPECT_EQ(choose(pair.cuda, select), choose(pair.cpu, select)) << count;
  }
}

struct TopCase {
  int num_kv_heads;
  int num_heads;
  int maps_per_kv_head;
  int top_k;
  int max_selected;
  int length;
  bool tied;  // block maxima of few values, at most two of them a map: sums are equal to the bit
};

// One layer's choice from random rows. Where `bad`, one map of the last row is not finite.
std::vector<std::vector<std::vector<std::int32_t>>> select_top(DeviceUnderTest& on,
                                                               const TopCase& c, bool bad) {
  constexpr int kRows = 3;
  const KvShape shape{2, c.num_kv_heads, 8, DataType::kFp16};
  const int pitch = c.length / kBlockTokens + 3;
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> lse(static_cast<std::size_t>(kRows * c.num_heads), 1.5F);
  std::vector<float> block_max(lse.size() * static_cast<std::size_t>(pitch));
  for (float& value : block_max) value = c.tied ? std::round(2 * normal(random)) : normal(random);
  if (bad && pitch > 60) block_max[block_max.size() - 30] = std::numeric_limits<float>::quiet_NaN();
  std::deque<DeviceSequence> sequences;
  std::deque<DeviceSelection> selections;
  std::vector<SequenceKv> kv;
  std::vector<Selection> chosen;
  for (int row = 0; row < kRows; ++row) {
    sequences.emplace_back(on, shape, 4, 8);
    sequences.back().length.set({std::max(0, c.length - 100 * row)});
    selections.emplace_back(on, shape, c.max_selected);
    kv.push_back(sequences.back().kv);
    chosen.push_back(selections.back().selection);
  }
  const DeviceArray<float> device_lse(on, lse);
  const DeviceArray<float> device_max(on, block_max);
  const DeviceArray<SequenceKv> device_kv(on, kv);
  const DeviceArray<Selection> device_chosen(on, chosen);
  on.run(&Device::select_top,
         SelectTopArgs{device_max.data(), device_lse.data(), pitch, c.num_heads, device_kv.data(),
                       device_chosen.data(), kRows, 1, c.maps_per_kv_head, c.top_k});
  std::vector<std::vector<std::vector<std::int32_t>>> all;
  for (const DeviceSelection& selection : selections) all.push_back(selection.chosen());
  return all;
}

class SelectTop : public CudaTest, public testing::WithParamInterface<TopCase> {};

TEST_P(SelectTop, IsTheCpus) {
  Pair pair;
  for (const bool bad : {false, true}) {
    EXPECT_EQ(select_top(pair.cuda, GetParam(), bad), select_top(pair.cpu, GetParam(), bad))
        << (bad ? "not finite" : "");
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, SelectTop,
    testing::Values(TopCase{1, 1, 1, 5, 5, 0, false}, TopCase{1, 1, 1, 5, 5, 150, false},
                    TopCase{9, 9, 1, 56, 56, 5000, true}, TopCase{2, 8, 2, 56, 80, 9000, true},
                    TopCase{2, 8, 1, 56, 56, 9000, false}, TopCase{1, 14, 7, 20, 100, 9000, true},
                    TopCase{8, 32, 1, 191, 191, 131'000, false},
                    TopCase{2, 4, 2, 3000, 4000, 131'000, true}));

}  // namespace
}  // namespace foretoken::kernels
