// The predictor's hot kernel, by the warp: listed segments, 8 at once, through the whole network.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/hot_list.cuh"
#include "kernels/cuda/spans.cuh"

namespace foretoken::kernels::cuda {

inline constexpr int kHotThreads = 128;
inline constexpr int kHotViews = 4;  // lists of a task and the two behind it, and one more

// The same pointer, of which the compiler now knows that it leads to device memory.
template <typename P>
__device__ P* in_global(P* pointer) {
  __builtin_assume(__isGlobal(pointer) != 0);
  return pointer;
}

// A list's sequence, as its tasks see it. In shared memory, which has more room than registers.
struct HotView {
  std::byte* maps;          // the first map's sums
  const std::byte* ring;    // the first map's candidates of row 0
  const HotEntry* entries;  // of the list
  std::uint32_t map_bytes;
  std::uint32_t row_bytes;
  std::int32_t scores;  // from a map's sums on
};

// A warp's tasks, each up to 8 entries of one list. Lane 4 g + q holds entry g and its part of the
// history. Entries are loaded two tasks ahead and history one, to be there when their turn comes.
template <typename T>
class HotTask {
 public:
  // Of a list: its tasks are [first_task[list], first_task[list + 1]); num_entries[list].
  // views: [kHotViews] in shared memory, this warp's.
  __device__ HotTask(const HotLists& lists, const HistoryState* states, const int* first_task,
                     const int* num_entries, HotView* views, int first)
      : lists_(lists),
        states_(states),
        first_task_(first_task),
        num_entries_(num_entries),
        views_(views) {
    open(first);
  }

  // Notes the entries of a task, the next to begin.
  __device__ void find(int task) {
    if (first_task_[next_.list + 1] <= task) open(task);
    const int first = (task - first_task_[next_.list]) * 8;
    next_.count = min(8, num_entries_[next_.list] - first);
    next_.entry =
        in_global(views_[next_.view].entries)[first + min(lane_id() / 4, next_.count - 1)];
  }

  __device__ void begin() {
    now_ = next_;
    const HotView& view = views_[now_.view];
    const int q = lane_id() % 4;
    const int back = (is_bottom() ? kSeenRows : kMostRowsBack) - q;
    const int first = column() - 2;
    const bool inside = first >= 0 && first + 8 <= columns() && back <= rows_of(now_.entry);
    const T* upper = row(view, back) + first;
    const T* lower = row(view, back - 2) + first;
    const bool has_lower = q < 3;
    if (!__all_sync(~0U, inside)) return load_edge(upper, has_lower ? lower : nullptr, back);
#pragma unroll
    for (int i = 0; i < 4; ++i) upper_[i] = HistoryPair<T>::read(upper + 2 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) lower_[i] = has_lower ? HistoryPair<T>::read(lower + 2 * i) : Raw{};
  }

  __device__ HotRows rows() const {
    std::uint32_t upper[4];
    std::uint32_t lower[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      upper[i] = HistoryPair<T>::scaled(upper_[i]);
      lower[i] = HistoryPair<T>::scaled(lower_[i]);
    }
    return {upper, lower};
  }
  __device__ bool is_bottom() const { return lists_.side_of(now_.list) == kBottom; }
  __device__ int column() const { return segment_of(now_.entry.of) * kSegmentWidth; }
  __device__ int columns() const { return columns_of(now_.entry); }

  // Where a result goes.
  struct Target {
    std::uint32_t of;  // HotEntry's, of the result's segment
    std::int32_t view;
    std::int32_t sign;  // of what is added to the sums: 0 where they stay; kNoTarget
  };
  static constexpr std::int32_t kNoTarget = 2;
  __device__ Target target() const {
    const int segment = result_segment();
    const std::uint32_t of = __shfl_sync(~0U, now_.entry.of, segment * 4);
    const std::int32_t sign = slides(of) ? (is_bottom() ? 1 : -1) : 0;
    return {of, now_.view, segment < now_.count ? sign : kNoTarget};
  }
  __device__ void add(const Target& target, const HotResult& result) const {
    if (target.sign == kNoTarget) return;
    const HotView& view = views_[target.view];
    auto* sums = in_global(reinterpret_cast<std::int32_t*>(
                     view.maps + static_cast<std::uint64_t>(map_of(target.of)) * view.map_bytes)) +
                 segment_of(target.of) * kSegmentWidth + result_column();
    const std::int32_t inner = target.sign * result.inner;
    atomicAdd(sums + view.scores, inner + result.edge);
    if (inner != 0) atomicAdd(sums, inner);
  }

 private:
  using Raw = typename PairRows<T>::Raw;
  struct Found {
    int list;
    int count;
    int view;
    HotEntry entry;
  };
  // The row so far back, wherever that is in the ring.
  __device__ const T* row(const HotView& view, int back) const {
    const int place = place_of(now_.entry) - back;
    const auto at = static_cast<std::uint32_t>(map_of(now_.entry.of) * kRingRows +
                                               (place < 0 ? place + kRingRows : place));
    return in_global(
        reinterpret_cast<const T*>(view.ring + static_cast<std::uint64_t>(at) * view.row_bytes));
  }
  // Where some lane's part is no candidate's, or of a row before the first.
  __device__ void load_edge(const T* upper, const T* lower, int back) {
    const int first = column() - 2;
    const int rows = rows_of(now_.entry);
    // All are asked for before the first is looked at.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = first + 2 * i >= 0 && first + 2 * i < columns();
      const bool has_upper = exists && back <= rows;
      const bool has_lower = exists && back - 2 <= rows && lower != nullptr;
      upper_[i] = has_upper ? HistoryPair<T>::read(upper + 2 * i) : Raw{};
      lower_[i] = has_lower ? HistoryPair<T>::read(lower + 2 * i) : Raw{};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + 2 * i + 1 != columns()) continue;
      upper_[i] = HistoryPair<T>::first(upper_[i]);
      lower_[i] = HistoryPair<T>::first(lower_[i]);
    }
  }
  // The list that holds a task.
  __device__ void open(int task) {
    int before = 0;  // lists that end before it
#pragma unroll 1
    for (int i = lane_id(); i < lists_.num_lists(); i += 32) {
      before += first_task_[i + 1] <= task ? 1 : 0;
    }
    const int list = __reduce_add_sync(~0U, before);
    next_.list = list;
    next_.view = (next_.view + 1) % kHotViews;
    __syncwarp();
    if (lane_id() == 0) {
      const HistoryState& state = states_[lists_.sequence_of(list)];
      views_[next_.view] = {
          state.stream + sums_offset(),
          reinterpret_cast<const std::byte*>(history_row<T>(state, 0, 0, 0) + kSinkColumns),
          lists_.entries(state, list),
          static_cast<std::uint32_t>(map_bytes(state.max_columns)),
          static_cast<std::uint32_t>(state.pitch) * static_cast<std::uint32_t>(sizeof(T)),
          padded_candidates(state.max_columns)};
    }
    __syncwarp();
  }

  const HotLists& lists_;
  const HistoryState* states_;
  const int* first_task_;
  const int* num_entries_;
  HotView* views_;
  Found next_{};
  Found now_{};
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
                        const HistoryState* states, const int* first_task, const int* num_entries,
                        HotView* views) {
  const HotShare share(first_task, lists.of_side());
  const int size = share.size();
  if (size == 0) return;
  HotTask<T> task(lists, states, first_task, num_entries, views, share.task(0));
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
    task.add(target, is_bottom
                         ? evaluate_hot<HotKind::kBottom>(tables, weights, rows, column, columns)
                         : evaluate_hot<HotKind::kTop>(tables, weights, rows, column, columns));
  }
}

}  // namespace foretoken::kernels::cuda
