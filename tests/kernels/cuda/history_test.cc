// Device::history_append on the GPU: the rings that it leaves are those of the CPU device.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "tests/kernels/cuda/history_on_device.h"

namespace foretoken::kernels {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kGroup = 4;
constexpr int kKvHeads = 2;
constexpr int kHeads = kKvHeads * kGroup;
constexpr int kLayers = 2;
constexpr int kLayer = 1;
constexpr int kSlots = 40;

// One call's input for all sequences.
struct Rows {
  int rows = 1;
  int pitch = 0;
  std::vector<float> block_max;  // [sequences, heads, rows, pitch]; by slot:
                                 // [sequences, layers, heads, slots]
  std::vector<float> lse;        // [sequences, heads, rows]
  std::vector<std::int32_t> columns;
  std::vector<std::vector<std::int32_t>> slot_to_block;  // by sequence; none: by block
};

Rows random_rows(const std::vector<std::int32_t>& columns, int rows, bool by_slot, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::bernoulli_distribution absent(0.2);
  Rows out;
  out.rows = rows;
  out.columns = columns;
  out.pitch = by_slot ? kSlots : *std::max_element(columns.begin(), columns.end()) + 5;
  const std::size_t maps = columns.size() * kHeads * static_cast<std::size_t>(rows);
  const std::size_t maxima = (by_slot ? kLayers : 1) * maps * static_cast<std::size_t>(out.pitch);
  for (std::size_t i = 0; i < maxima; ++i) {
    out.block_max.push_back(absent(random) ? kNone : 2 * normal(random) - 6);
  }
  for (std::size_t i = 0; i < maps; ++i) out.lse.push_back(std::abs(normal(random)));
  for (std::size_t s = 0; by_slot && s < columns.size(); ++s) {
    std::vector<std::int32_t> table;
    for (int head = 0; head < kLayers * kKvHeads; ++head) {
      std::vector<std::int32_t> blocks(static_cast<std::size_t>(columns[s]));
      for (std::size_t b = 0; b < blocks.size(); ++b) blocks[b] = static_cast<std::int32_t>(b);
      std::shuffle(blocks.begin(), blocks.end(), random);
      blocks.resize(kSlots, kAbsent);
      for (auto& block : blocks) block = absent(random) ? kAbsent : block;
      table.insert(table.end(), blocks.begin(), blocks.end());
    }
    out.slot_to_block.push_back(table);
  }
  return out;
}

void append(DeviceUnderTest& on, std::vector<HistoryOnDevice>& histories, const Rows& rows,
            bool hold) {
  std::vector<HistoryState> states;
  for (const auto& history : histories) states.push_back(history.state());
  std::vector<DeviceArray<std::int32_t>> tables;
  for (const auto& table : rows.slot_to_block) tables.emplace_back(on, table);
  const DeviceArray<float> block_max(on, rows.block_max);
  std::vector<SequenceKv> sequences(tables.size());
  for (std::size_t s = 0; s < tables.size(); ++s) {
    sequences[s].slot_to_block = tables[s].data();
    sequences[s].num_slots = kSlots;
    sequences[s].shape.num_layers = kLayers;
    sequences[s].shape.num_kv_heads = kKvHeads;
    sequences[s].block_max = block_max.data() + s * kLayers * kHeads * kSlots;
  }
  const DeviceArray<HistoryState> device_states(on, states);
  const DeviceArray<SequenceKv> device_sequences(on, sequences);
  const DeviceArray<float> lse(on, rows.lse);
  const DeviceArray<std::int32_t> columns(on, rows.columns);
  on.run(&Device::history_append,
         HistoryAppendArgs{.states = device_states.data(),
                           .num_sequences = static_cast<int>(histories.size()),
                           .layer = kLayer,
                           .block_max = sequences.empty() ? block_max.data() : nullptr,
                           .lse = lse.data(),
                           .rows = rows.rows,
                           .pitch = rows.pitch,
                           .sequences = device_sequences.data(),
                           .num_heads = kHeads,
                           .num_columns = columns.data(),
                           .hold = hold});
}

struct Case {
  HistoryType type;
  int maps_per_kv_head;
  bool hold;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << bytes_of(c.type) << " bytes, " << c.maps_per_kv_head << " maps a KV head"
       << (c.hold ? ", hold" : "");
}

class CudaHistory : public CudaTest, public testing::WithParamInterface<Case> {};

TEST_P(CudaHistory, RingsEqualTheCpus) {
  const Case c = GetParam();
  Pair pair;
  constexpr int kMaxColumns = 9001;  // more than one pass of the grid
  const HistoryShape shape{.num_layers = kLayers,
                           .num_kv_heads = kKvHeads,
                           .maps_per_kv_head = c.maps_per_kv_head,
                           .max_columns = kMaxColumns,
                           .type = c.type};
  std::vector<HistoryOnDevice> cpu;
  std::vector<HistoryOnDevice> cuda;
  for (int s = 0; s < 2; ++s) {
    cpu.emplace_back(pair.cpu, shape);
    cuda.emplace_back(pair.cuda, shape);
  }
  // Prefill, steps that read slots, one over all blocks, and a prefill over a wrapped ring.
  const std::vector<Rows> calls = {random_rows({1, kMaxColumns - 2}, 64, false, 1),
                                   random_rows({1, kMaxColumns - 2}, 1, true, 2),
                                   random_rows({2, kMaxColumns - 1}, 1, true, 3),
                                   random_rows({3, kMaxColumns}, 1, false, 4),
                                   random_rows({17, 100}, 1, true, 5),
                                   random_rows({18, 101}, 3, false, 6)};
  for (const Rows& rows : calls) {
    append(pair.cpu, cpu, rows, c.hold);
    append(pair.cuda, cuda, rows, c.hold);
  }
  // The exponentials differ by some of their last bits, so a value may round to its neighbour.
  const float relative = c.type == HistoryType::kFp32   ? 4e-6F
                         : c.type == HistoryType::kBf16 ? 1.0F / 128
                                                        : 1.0F / 8;
  for (std::size_t s = 0; s < cpu.size(); ++s) {
    EXPECT_EQ(cuda[s].num_rows(), cpu[s].num_rows());
    EXPECT_EQ(cuda[s].num_columns(), cpu[s].num_columns());
    for (int map = 0; map < shape.num_maps(); ++map) {
      const auto want = cpu[s].ring(kLayer, map);
      const auto got = cuda[s].ring(kLayer, map);
      std::size_t different = 0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        if (got[i] == want[i]) continue;  // infinity among them
        ASSERT_NEAR(got[i], want[i], relative * std::abs(want[i]) + 0x1p-29F)
            << "sequence " << s << " map " << map << " row " << i / shape.pitch() << " column "
            << i % shape.pitch();
        different += got[i] != want[i] ? 1 : 0;
      }
      if (c.type != HistoryType::kFp32) {
        EXPECT_LE(different, want.size() / 1000);
      }
      EXPECT_EQ(cuda[s].ring(0, map), cpu[s].ring(0, map)) << "another layer";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CudaHistory,
    testing::Values(Case{HistoryType::kFp32, 1, false}, Case{HistoryType::kFp32, kGroup, true},
                    Case{HistoryType::kBf16, 1, true}, Case{HistoryType::kBf16, kGroup, false},
                    Case{HistoryType::kE5m3, 1, false}, Case{HistoryType::kE5m3, kGroup, true}));

}  // namespace
}  // namespace foretoken::kernels
