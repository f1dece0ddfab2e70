// The predictor's hot kernel, by the warp: listed segments, 8 at once, through the whole network.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/hot_list.cuh"
#include "kernels/cuda/spans.cuh"

namespace foretoken::kernels::cuda {

inline constexpr int kHotThreads = 128;

// A warp's tasks, each up to 8 entries of one list. Lane 4 g + q holds entry g and its part of the
// history. Entries are loaded two tasks ahead and history one, to be there when their turn comes.
template <typename T>
class HotTask {
 public:
  // Of a list: its tasks are [first_task[list], first_task[list + 1]); num_entries[list].
  __device__ HotTask(const HotLists& lists, const HistoryState* states, const int* first_task,
                     const int* num_entries, int first)
      : lists_(lists), states_(states), first_task_(first_task), num_entries_(num_entries) {
    open(first);
  }

  // Notes the entries of a task, the next to begin.
  __device__ void find(int task) {
    if (first_task_[next_.list + 1] <= task) open(task);
    const int first = (task - first_task_[next_.list]) * 8;
    next_.count = min(8, num_entries_[next_.list] - first);
    next_.entry = entries_[first + min(lane_id() / 4, next_.count - 1)];
  }

  __device__ void begin() {
    now_ = next_;
    view_ = next_view_;
    const MapStep step =
        *reinterpret_cast<const MapStep*>(map_at(map_of(now_.entry)) + offsetof(MapHeader, step));
    columns_ = step.columns;
    const T* ring =
        view_.ring + static_cast<std::int64_t>(map_of(now_.entry)) * kRingRows * view_.pitch;
    const int upper_back = (is_bottom() ? kSeenRows : kMostRowsBack) - lane_id() % 4;
    const auto row = [&](int back) -> const T* {
      const int place = step.place - back + (step.place < back ? kRingRows : 0);
      return back <= step.rows ? ring + place * view_.pitch : nullptr;
    };
    const T* upper = row(upper_back);
    const T* lower = lane_id() % 4 < 3 ? row(upper_back - 2) : nullptr;
    const int first = column() - 2;
    const bool inside = first >= 0 && first + 8 <= columns_ && upper != nullptr;
    if (!__all_sync(~0U, inside)) {
      const PairRows<T> rows{ring, view_.pitch, columns_};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        upper_[i] = rows.load(upper, first + 2 * i);
        lower_[i] = rows.load(lower, first + 2 * i);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      upper_[i] = HistoryPair<T>::read(upper + first + 2 * i);
      lower_[i] = lower != nullptr ? HistoryPair<T>::read(lower + first + 2 * i) : Raw{};
    }
  }

  __device__ HotRows rows() const {
    HotRows out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.set(i, HistoryPair<T>::scaled(upper_[i]), HistoryPair<T>::scaled(lower_[i]));
    }
    return out;
  }
  __device__ bool is_bottom() const { return lists_.side_of(now_.list) == kBottom; }
  __device__ int column() const { return segment_of(now_.entry) * kSegmentWidth; }
  __device__ int columns() const { return columns_; }

  // Adds a result to the map's sums.
  struct Target {
    std::int32_t* boundary;
    std::int32_t* sums;
    bool present;
    bool slides;
    int sign;
  };
  __device__ Target target() const {
    const int segment = result_segment();
    const std::uint32_t entry = __shfl_sync(~0U, now_.entry, segment * 4);
    auto* sums = reinterpret_cast<std::int32_t*>(map_at(map_of(entry)) + sums_offset()) +
                 segment_of(entry) * kSegmentWidth + result_column();
    return {sums + view_.padded, sums, segment < now_.count, slides(entry), is_bottom() ? 1 : -1};
  }
  __device__ static void add(const Target& target, const HotResult& result) {
    if (!target.present) return;
    atomicAdd(target.boundary, result.edge);
    if (target.slides) atomicAdd(target.sums, target.sign * result.inner);
  }

 private:
  using Raw = typename PairRows<T>::Raw;
  struct Found {
    int list;
    int count;
    std::uint32_t entry;
  };
  // A sequence, as its lists' tasks see it.
  struct View {
    std::byte* maps;
    const T* ring;  // the first map's candidates of row 0
    std::uint32_t map_bytes;
    int pitch;
    int padded;  // from a map's sums to its boundary
  };
  // The list that holds a task.
  __device__ void open(int task) {
    int before = 0;  // lists that end before it
    for (int i = lane_id(); i < lists_.num_lists(); i += 32) {
      before += first_task_[i + 1] <= task ? 1 : 0;
    }
    const int list = __reduce_add_sync(~0U, before);
    next_.list = list;
    const HistoryState& state = states_[lists_.sequence_of(list)];
    entries_ = lists_.entries(state, list);
    next_view_ = {state.stream, history_row<T>(state, 0, 0, 0) + kSinkColumns,
                  static_cast<std::uint32_t>(map_bytes(state.max_columns)), state.pitch,
                  padded_candidates(state.max_columns)};
  }
  __device__ std::byte* map_at(int map) const {
    return view_.maps + static_cast<std::uint64_t>(map) * view_.map_bytes;
  }

  const HotLists& lists_;
  const HistoryState* states_;
  const int* first_task_;
  const int* num_entries_;
  const std::uint32_t* entries_;  // of the next task's list
  Found next_{};
  View next_view_{};
  Found now_{};
  View view_{};
  int columns_;
  Raw upper_[4];
  Raw lower_[4];
};

// A warp's share of the tasks: of either side, as these take different times, neighbours.
struct HotShare {
  int first[kNumSides];
  int count[kNumSides];

  __device__ HotShare(const int* first_task, int lists_of_side) {
#pragma unroll
    for (int side = 0; side < kNumSides; ++side) {
      const int begin = first_task[side * lists_of_side];
      const int all = first_task[(side + 1) * lists_of_side] - begin;
      // Those that get one more of one side get one less of the other.
      const int warp = side == 0 ? warp_of_grid() : warps_of_grid() - 1 - warp_of_grid();
      const int each = all / warps_of_grid();
      const int rest = all - each * warps_of_grid();
      first[side] = begin + warp * each + min(warp, rest);
      count[side] = each + (warp < rest ? 1 : 0);
    }
  }
  __device__ int size() const { return count[0] + count[1]; }
  __device__ int task(int i) const { return i < count[0] ? first[0] + i : first[1] + i - count[0]; }
};

template <typename T>
__device__ void run_hot(const HotTables& tables, const HotWeights& weights, const HotLists& lists,
                        const HistoryState* states, const int* first_task, const int* num_entries) {
  const HotShare share(first_task, lists.of_side());
  const int size = share.size();
  if (size == 0) return;
  HotTask<T> task(lists, states, first_task, num_entries, share.task(0));
  task.find(share.task(0));
  task.begin();
  if (size > 1) task.find(share.task(1));
  for (int i = 0; i < size; ++i) {
    const HotRows rows = task.rows();
    const int column = task.column();
    const int columns = task.columns();
    const bool is_bottom = task.is_bottom();
    const auto target = task.target();
    if (i + 1 < size) task.begin();
    if (i + 2 < size) task.find(share.task(i + 2));
    HotTask<T>::add(
        target, is_bottom ? evaluate_hot<HotKind::kBottom>(tables, weights, rows, column, columns)
                          : evaluate_hot<HotKind::kTop>(tables, weights, rows, column, columns));
  }
}

}  // namespace foretoken::kernels::cuda
