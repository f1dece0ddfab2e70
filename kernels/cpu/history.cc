// CpuDevice::history_append.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/history_rows.h"
#include "kernels/cpu/slot_table.h"

namespace foretoken::kernels {
namespace {

// Fewer exponentials than this are done before a second thread has woken up. Guessed.
constexpr int kSerialValues = 16384;

constexpr float kNoValue = -1.0F;  // a probability never is: marks a block that was not attended

// Where a column of block_max belongs: itself, or the block that lies in that slot.
class ColumnMap {
 public:
  // slot_to_block: null where columns are blocks.
  ColumnMap(const std::int32_t* slot_to_block, int count)
      : slot_to_block_(slot_to_block), count_(count) {}
  int count() const { return count_; }
  int column(int i) const { return slot_to_block_ == nullptr ? i : slot_to_block_[i]; }

 private:
  const std::int32_t* slot_to_block_;
  int count_;
};

// Which of the args' layers, sequences and maps.
struct Place {
  int layer;  // of the args': args.layer + this
  int sequence;
  int map;
};

ColumnMap column_map(const HistoryAppendArgs& args, const Place& place, int kv_head, int columns) {
  if (args.block_max != nullptr) return {nullptr, columns};
  const SequenceKv& kv = args.sequences[place.sequence];
  return {&block_in_slot(kv, args.layer + place.layer, kv_head, 0), kv.num_slots};
}

// at: of the head and row, in lse.
const float* maxima_of(const HistoryAppendArgs& args, const Place& place, int head,
                       std::ptrdiff_t at) {
  if (args.block_max != nullptr) return args.block_max + at * args.pitch;
  return block_max_of(args.sequences[place.sequence], args.layer + place.layer, args.num_heads,
                      head);
}

// values[c] = mean over the map's heads of exp(block_max - lse), or kNoValue.
void row_values(const HistoryAppendArgs& args, const Place& place, int num_heads, int row,
                const ColumnMap& map, std::vector<float>& values) {
  std::fill(values.begin(), values.end(), kNoValue);
  const float share = 1.0F / static_cast<float>(num_heads);
  const std::ptrdiff_t sequence =
      static_cast<std::ptrdiff_t>(place.layer) * args.num_sequences + place.sequence;
  for (int h = place.map * num_heads; h < (place.map + 1) * num_heads; ++h) {
    const std::ptrdiff_t at = (sequence * args.num_heads + h) * args.rows + row;
    const float* maxima = maxima_of(args, place, h, at);
    const float lse = args.lse[at];
    for (int i = 0; i < map.count(); ++i) {
      const int column = map.column(i);
      if (maxima[i] == -std::numeric_limits<float>::infinity()) continue;
      if (column < 0 || column >= static_cast<int>(values.size())) continue;  // an empty slot
      float& value = values[static_cast<std::size_t>(column)];
      value = (value == kNoValue ? 0.0F : value) + share * std::exp(maxima[i] - lse);
    }
  }
}

// Appends the rows of one map. Columns beyond a row's own are stored as zeros, so that a later,
// wider window reads zero there.
void append_map(const HistoryAppendArgs& args, const Place& place) {
  const HistoryState& state = args.states[place.sequence];
  const int columns = args.num_columns[place.sequence];
  const int layer = args.layer + place.layer;
  const auto type = static_cast<HistoryType>(state.type);
  const int heads_per_map = args.num_heads / num_maps(state);
  const ColumnMap to_column = column_map(args, place, place.map / state.maps_per_kv_head, columns);
  std::vector<float> values(static_cast<std::size_t>(columns));
  std::vector<float> last(static_cast<std::size_t>(columns), 0.0F);
  std::vector<float> stored(static_cast<std::size_t>(state.pitch), 0.0F);

  std::int64_t r = state.num_rows[layer];
  if (args.hold && r > 0) {
    decode_history(type, history_row(state, layer, place.map, r - 1), 0, columns, last.data());
  }
  for (int row = 0; row < args.rows; ++row, ++r) {
    row_values(args, place, heads_per_map, row, to_column, values);
    for (std::size_t c = 0; c < values.size(); ++c) {
      if (values[c] == kNoValue) values[c] = args.hold ? last[c] : 0.0F;
    }
    std::copy(values.begin(), values.end(), stored.begin());
    encode_history(type, stored.data(), state.pitch, history_row(state, layer, place.map, r));
    last.swap(values);
  }
}

std::int64_t num_exponentials(const HistoryAppendArgs& args) {
  std::int64_t columns = 0;
  for (int s = 0; s < args.num_sequences; ++s) {
    columns += args.block_max != nullptr ? args.pitch : args.sequences[s].num_slots;
  }
  return columns * args.num_layers * args.num_heads * args.rows;
}

}  // namespace

void CpuDevice::history_append(const HistoryAppendArgs& args, Stream& stream) {
  FT_CHECK(args.rows >= 1 && args.rows <= kHistoryRows, args.rows);
  FT_CHECK(args.block_max != nullptr || args.rows == 1, args.rows);
  enqueue(stream, [this, args] {
    if (args.num_sequences == 0) return;
    const int maps = num_maps(args.states[0]);
    FT_CHECK(maps > 0 && args.num_heads % maps == 0, args.num_heads, maps);
    for (int s = 0; s < args.num_sequences; ++s) {
      const HistoryState& state = args.states[s];
      FT_CHECK(num_maps(state) == maps && args.layer + args.num_layers <= state.num_layers, s,
               args.layer, args.num_layers);
      FT_CHECK(args.num_columns[s] <= state.max_columns, s, args.num_columns[s]);
    }
    const int num_tasks = args.num_layers * args.num_sequences * maps;
    const auto append = [&](int task, int) {
      const int sequence = task / maps % args.num_sequences;
      append_map(args, {task / maps / args.num_sequences, sequence, task % maps});
    };
    if (num_exponentials(args) <= kSerialValues) {
      for (int task = 0; task < num_tasks; ++task) append(task, 0);
    } else {
      pool_.parallel_for(num_tasks, append);
    }
    for (int s = 0; s < args.num_sequences; ++s) {
      for (int layer = args.layer; layer < args.layer + args.num_layers; ++layer) {
        args.states[s].num_rows[layer] += args.rows;
        args.states[s].num_columns[layer] = args.num_columns[s];
      }
    }
  });
}

}  // namespace foretoken::kernels
