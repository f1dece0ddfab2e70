// resolve on the CUDA device against the CPU device under random traffic: the same tables, the
// same fetch lists, entry for entry.
#include <gtest/gtest.h>

#include <deque>
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

}  // namespace
}  // namespace foretoken::kernels
