// The predictor on the GPU: the CNN's scores of every map, streamed from step to step, then the
// choice (best_blocks.cu). docs/predictor.md derives the streaming evaluation and the cold regime.
//
//   slide    every span of 64 columns: cold segments' rows that enter, leave and stand at the
//            window's edges; lists the other segments. Bound by reading 10 rows of history.
//   hot      the listed segments, 8 at once, through the whole network on tensor cores.
//   rebuild  spans whose sums start anew: after prefill, and where columns enter. Else nothing.
//   choose   top-k and union.
// Grids are persistent and read sizes from device memory, so one recorded graph serves every step.
#include <cmath>
#include <span>
#include <string>

#include "common/check.h"
#include "common/result.h"
#include "kernels/cuda/best_blocks.h"
#include "kernels/cuda/cnn.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/history_pair.cuh"
#include "kernels/cuda/hot_list.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kSlideThreads = 256;
constexpr int kHotThreads = 128;
constexpr int kFirstInner = 2;  // window rows 2 .. 61 see no edge of the window
constexpr int kLastInner = kHistoryRows - 3;
constexpr int kSeenRows = 5;                         // of history, by a row of outputs
constexpr unsigned kNewest = 1U << (kSeenRows - 1);  // of them: the others were checked before

class CudaPredictor final : public Predictor {
 public:
  explicit CudaPredictor(const PredictorWeights& weights) {
    const CnnTables tables = make_cnn_tables(weights);
    FT_CUDA(cudaMalloc(reinterpret_cast<void**>(&tables_), sizeof tables));
    FT_CUDA(cudaMemcpy(tables_, &tables, sizeof tables, cudaMemcpyHostToDevice));
  }
  ~CudaPredictor() override { cudaFree(tables_); }
  CudaPredictor(const CudaPredictor&) = delete;
  CudaPredictor& operator=(const CudaPredictor&) = delete;
  const CnnTables* tables() const { return tables_; }

 private:
  CnnTables* tables_ = nullptr;
};

__device__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ int warp_of_grid() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
}
__device__ int warps_of_grid() { return static_cast<int>(gridDim.x * blockDim.x) / 32; }

template <typename T>
__device__ PairRows<T> rows_of(const Map& map) {
  return {history_row<T>(map.state, 0, map.index, 0) + kSinkColumns, map.state.pitch,
          map.candidates()};
}

// Rows first + i, of the bits i, hold values that are none: scores are not to be used until the
// last of them has left the window.
__device__ void distrust(const Map& map, std::int64_t first, unsigned rows) {
  if (rows == 0) return;
  const std::int64_t row = first + 31 - __clz(static_cast<int>(rows));
  atomicMax(reinterpret_cast<unsigned long long*>(&map.header().clean_from),
            static_cast<unsigned long long>(row + kHistoryRows + 1));
}

// The column that this lane reads of a row, for segment g + 8 half of a span.
__device__ int read_column(int span, int half) {
  const int lane = lane_id();
  return span * kSpanColumns + (lane / 4 + half * 8) * kSegmentWidth - 2 + lane % 4 * 2;
}
// The first column that it writes of cold_products().
__device__ int written_column(int span, int half) {
  const int lane = lane_id();
  return span * kSpanColumns + (lane / 4 + half * 8) * kSegmentWidth + lane % 2 * 2;
}
__device__ int first_column(int span, int half) {
  return span * kSpanColumns + (lane_id() / 4 + half * 8) * kSegmentWidth;
}

// A span's part of 5 history rows, as they lie in memory.
template <typename T>
using RawColdRows = typename PairRows<T>::Raw[kSeenRows][2];

template <typename T>
__device__ void load_cold_rows(const PairRows<T>& rows, std::int64_t first, int span,
                               RawColdRows<T>& out) {
#pragma unroll
  for (int i = 0; i < kSeenRows; ++i) {
    const T* row = rows.row(first + i);
#pragma unroll
    for (int half = 0; half < 2; ++half) out[i][half] = rows.load(row, read_column(span, half));
  }
}

// Of the result, bit i: row i holds a value that is none, among those that this lane reads.
template <typename T>
__device__ unsigned make_operands(const PairRows<T>& rows, const RawColdRows<T>& raw, int span,
                                  ColdRows& out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = read_column(span, half);
#pragma unroll
    for (int i = 0; i < kSeenRows; ++i) {
      out.values[i][half] = rows.operand(raw[i][half], column);
    }
  }
  out.find_most();
  constexpr std::uint32_t kGreatest = ColdOperandOf<T>::kGreatest;
  const auto is_wrong = [](std::uint32_t pair) {
    return (pair & 0xFFFFU) > kGreatest || pair >> 16 > kGreatest;
  };
  unsigned wrong_rows = 0;
  if (is_wrong(__vmaxu2(out.most[0], out.most[1]))) {
#pragma unroll
    for (int i = 0; i < kSeenRows; ++i) {
      const bool wrong = is_wrong(__vmaxu2(out.values[i][0], out.values[i][1]));
      wrong_rows |= wrong ? 1U << i : 0U;
    }
  }
  return wrong_rows;
}

// Cold, and not where the network pads.
__device__ void find_cold_segments(const ColdTables& tables, const ColdRows& rows, int span,
                                   int columns, bool (&cold)[2]) {
  find_cold(tables, rows, cold);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = first_column(span, half);
    if (first < columns && at_edge(first, columns)) cold[half] = false;
  }
}

// ---- slide -----------------------------------------------------------------------------------

// Appends the span's hot segments: lane 4 g + q those of side q / 2, segment g + 8 (q % 2).
__device__ void list_hot(const HotLists& lists, int sequence, const Map& map, int span,
                         const bool (&cold)[kNumSides][2], int columns, bool slides) {
  const int lane = lane_id();
  const int side = lane % 4 / 2;
  const int half = lane % 2;
  const bool is_cold =
      side == 0 ? (half == 0 ? cold[0][0] : cold[0][1]) : (half == 0 ? cold[1][0] : cold[1][1]);
  const bool hot = !is_cold && first_column(span, half) < columns;
  const unsigned all = __ballot_sync(~0U, hot);
  if (all == 0) return;
  const unsigned of_side = all & (side == 0 ? 0x33333333U : 0xCCCCCCCCU);
  const int list = lists.list(sequence, map.index, side);
  unsigned at = 0;
  if (lane % 2 == 0 && lane < 4 && of_side != 0) {
    at = atomicAdd(&lists.counters[list], static_cast<unsigned>(__popc(of_side)));
  }
  at = __shfl_sync(~0U, at, side * 2) + static_cast<unsigned>(__popc(of_side & ((1U << lane) - 1)));
  if (hot) {
    const int segment = first_column(span, half) / kSegmentWidth;
    *lists.entry(map.state, list, static_cast<int>(at)) = hot_entry(map.index, segment, slides);
  }
}

template <typename T>
__device__ void slide_span(const ColdTables& tables, const HotLists& lists, int sequence,
                           const Map& map, const PairRows<T>& rows, bool slides, int span) {
  const std::int64_t num_rows = map.num_rows();
  const std::int64_t first_row[kNumSides] = {num_rows - kSeenRows, num_rows - kHistoryRows - 1};
  RawColdRows<T> raw[kNumSides];
  load_cold_rows(rows, first_row[kBottom], span, raw[kBottom]);
  load_cold_rows(rows, first_row[kTop], span, raw[kTop]);
  const bool is_inner = lane_id() % 4 < 2;  // what this lane gets of cold_products()
  int2 value[2] = {};
  if (is_inner) {
    value[0] = *reinterpret_cast<const int2*>(map.sums() + written_column(span, 0));
    value[1] = *reinterpret_cast<const int2*>(map.sums() + written_column(span, 1));
  }
  bool cold[kNumSides][2];
#pragma unroll
  for (int side = 0; side < kNumSides; ++side) {
    ColdRows seen;
    const unsigned wrong = make_operands(rows, raw[side], span, seen);
    if (side == kBottom) distrust(map, first_row[side], wrong & kNewest);
    find_cold_segments(tables, seen, span, rows.columns, cold[side]);
    int2 added[2];
    cold_products<ColdOperandOf<T>::kKind>(tables, side, seen, added);
    const int sign = is_inner ? (slides ? (side == kBottom ? 1 : -1) : 0) : 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int factor = cold[side][half] ? sign : 0;
      value[half].x += factor * added[half].x;
      value[half].y += factor * added[half].y;
    }
  }
  std::int32_t* out = is_inner ? map.sums() : map.boundary();
  *reinterpret_cast<int2*>(out + written_column(span, 0)) = value[0];
  *reinterpret_cast<int2*>(out + written_column(span, 1)) = value[1];
  list_hot(lists, sequence, map, span, cold, rows.columns, slides);
}

// A warp's item: so many spans of a map, which are neighbours.
constexpr int kSpansOfItem = 2;

template <typename T>
__device__ void run_slide(const ColdTables& tables, const HistoryState* states,
                          const int* first_item, int rows, const HotLists& lists) {
  int sequence = 0;
  for (int i = warp_of_grid(); i < first_item[rows]; i += warps_of_grid()) {
    const Item item = find_item(states, first_item, i, &sequence);
    const Map map{states[item.sequence], item.map};
    if (!is_scored(map.state, map.layer())) continue;
    const PairRows<T> map_rows = rows_of<T>(map);
    const bool slides = progress_of(map.header(), map.num_rows(), map_rows.columns).slides;
    const int first = item.unit * kSpansOfItem;
    const int end = min(first + kSpansOfItem, num_spans(map_rows.columns));
    for (int span = first; span < end; ++span) {
      slide_span<T>(tables, lists, item.sequence, map, map_rows, slides, span);
    }
  }
}

__global__ void __launch_bounds__(kSlideThreads, 4)
    slide_kernel(const CnnTables* from, const HistoryState* states, int rows, HotLists lists) {
  __shared__ ColdTables tables;
  __shared__ int first_item[kMaxSequences + 1];
  allow_next_kernel();
  number_items(
      states, rows,
      [](const HistoryState& state, int layer) {
        const int spans = num_spans(num_candidates(state.num_columns[layer]));
        return is_scored(state, layer) ? (spans + kSpansOfItem - 1) / kSpansOfItem : 0;
      },
      first_item);
  // One type serves all sequences of a batch.
  with_history_type(states[0].type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    tables.load(*from, ColdOperandOf<T>::kKind);
    __syncthreads();
    run_slide<T>(tables, states, first_item, rows, lists);
  });
}

// ---- hot -------------------------------------------------------------------------------------

// A warp's task: up to 8 entries of one list. Lane 4 g + q holds entry g and its part of the
// history. Entries are loaded two tasks ahead and history one, to be there when their turn comes.
template <typename T>
class HotTask {
 public:
  // Lists and first tasks: a list's tasks are [first_task[list], first_task[list + 1]).
  __device__ HotTask(const HotLists& lists, const HistoryState* states, const int* first_task)
      : lists_(lists), states_(states), first_task_(first_task) {}

  // Notes the entries of a task, the next to begin.
  __device__ void find(int task) {
    while (first_task_[next_.list + 1] <= task) ++next_.list;
    const int first = (task - first_task_[next_.list]) * 8;
    next_.count = min(8, static_cast<int>(lists_.counters[next_.list]) - first);
    const HistoryState& state = states_[lists_.sequence_of(next_.list)];
    next_.entry = *lists_.entry(state, next_.list, first + min(lane_id() / 4, next_.count - 1));
  }

  __device__ void begin() {
    now_ = next_;
    const Map map{state(), map_of(now_.entry)};
    rows_ = rows_of<T>(map);
    const int q = lane_id() % 4;
    const std::int64_t first_row = map.num_rows() - (is_bottom() ? kSeenRows : kHistoryRows + 1);
    const T* upper = rows_.row(first_row + q);
    const T* lower = q < 3 ? rows_.row(first_row + q + 2) : nullptr;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      upper_[i] = rows_.load(upper, column() - 2 + 2 * i);
      lower_[i] = rows_.load(lower, column() - 2 + 2 * i);
    }
  }

  __device__ HotRows rows() const {
    HotRows out;
    bool ignored = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.upper[i] = rows_.convert(upper_[i], column() - 2 + 2 * i, &ignored);
      out.lower[i] = rows_.convert(lower_[i], column() - 2 + 2 * i, &ignored);
    }
    return out;
  }
  __device__ bool is_bottom() const { return HotLists::side_of(now_.list) == kBottom; }
  __device__ int column() const { return segment_of(now_.entry) * kSegmentWidth; }
  __device__ int columns() const { return rows_.columns; }

  // Adds a result to the map's sums.
  struct Target {
    const HistoryState* state;
    std::uint32_t entry;
    bool present;
    int sign;
  };
  __device__ Target target() const {
    const int segment = result_segment();
    const std::uint32_t entry = __shfl_sync(~0U, now_.entry, segment * 4);
    return {&state(), entry, segment < now_.count, is_bottom() ? 1 : -1};
  }
  __device__ static void add(const Target& target, const HotResult& result) {
    if (!target.present) return;
    const Map map{*target.state, map_of(target.entry)};
    const int column = segment_of(target.entry) * kSegmentWidth + result_column();
    atomicAdd(map.boundary() + column, result.edge);
    if (slides(target.entry)) atomicAdd(map.sums() + column, target.sign * result.inner);
  }

 private:
  struct Found {
    int list;
    int count;
    std::uint32_t entry;
  };
  __device__ const HistoryState& state() const { return states_[lists_.sequence_of(now_.list)]; }

  const HotLists& lists_;
  const HistoryState* states_;
  const int* first_task_;
  Found now_{};
  Found next_{};
  PairRows<T> rows_{};
  typename PairRows<T>::Raw upper_[4];
  typename PairRows<T>::Raw lower_[4];
};

template <typename T>
__device__ void run_hot(const HotTables& tables, const HotWeights& weights, const HotLists& lists,
                        const HistoryState* states, const int* first_task, int num_tasks) {
  HotTask<T> task(lists, states, first_task);
  const int stride = warps_of_grid();
  int now = warp_of_grid();
  if (now < num_tasks) task.find(now);
  if (now < num_tasks) task.begin();
  if (now + stride < num_tasks) task.find(now + stride);
  for (; now < num_tasks; now += stride) {
    const HotRows rows = task.rows();
    const int column = task.column();
    const int columns = task.columns();
    const bool is_bottom = task.is_bottom();
    const auto target = task.target();
    if (now + stride < num_tasks) task.begin();
    if (now + 2 * stride < num_tasks) task.find(now + 2 * stride);
    HotTask<T>::add(
        target, is_bottom ? evaluate_hot<HotKind::kBottom>(tables, weights, rows, column, columns)
                          : evaluate_hot<HotKind::kTop>(tables, weights, rows, column, columns));
  }
}

__global__ void __launch_bounds__(kHotThreads, 2)
    hot_kernel(const CnnTables* from, const HistoryState* states, int rows, HotLists lists) {
  __shared__ HotTables tables;
  __shared__ int first_task[kMaxSequences * kNumSides + 1];
  allow_next_kernel();
  tables.load(*from);
  HotWeights weights;
  weights.load(*from);
  wait_for_earlier_kernels();
  const int num_lists = lists.num_lists(rows);
  for (int i = static_cast<int>(threadIdx.x); i < num_lists; i += kHotThreads) {
    first_task[i] = (static_cast<int>(lists.counters[i]) + 7) / 8;
  }
  sum_up(num_lists, first_task);
  with_history_type(states[0].type, [&](auto tag) {
    run_hot<typename decltype(tag)::type>(tables, weights, lists, states, first_task,
                                          first_task[num_lists]);
  });
}

// ---- rebuild ---------------------------------------------------------------------------------

// Adds s of one inner row, of the segments of half a span that are not cold, to this lane's column.
template <typename T>
__device__ std::int32_t hot_inner(const HotTables& tables, const HotWeights& weights,
                                  const PairRows<T>& rows, std::int64_t first_row, int span,
                                  int half, bool cold) {
  const unsigned all_cold = __ballot_sync(~0U, cold);
  if (all_cold == ~0U) return 0;
  const int q = lane_id() % 4;
  const int column = first_column(span, half);
  const T* upper = rows.row(first_row + q);
  const T* lower = q < 3 ? rows.row(first_row + q + 2) : nullptr;
  HotRows seen;
  bool ignored = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = column - 2 + 2 * i;
    seen.upper[i] = rows.convert(rows.load(upper, at), at, &ignored);
    seen.lower[i] = rows.convert(rows.load(lower, at), at, &ignored);
  }
  const std::int32_t inner =
      evaluate_hot<HotKind::kInner>(tables, weights, seen, column, rows.columns).inner;
  return (all_cold >> (result_segment() * 4) & 1) != 0 ? 0 : inner;
}

template <typename T>
__device__ void rebuild_span(const ColdTables& cold_tables, const HotTables& tables,
                             const HotWeights& weights, const Map& map, int span, int first) {
  const PairRows<T> rows = rows_of<T>(map);
  const std::int64_t window = map.num_rows() - kHistoryRows;  // its first row
  int2 cold_sum[2] = {};
  std::int32_t hot_sum[2] = {};
  for (int row = kFirstInner; row <= kLastInner; ++row) {
    ColdRows seen;
    RawColdRows<T> raw;
    load_cold_rows(rows, window + row - 2, span, raw);
    const unsigned wrong = make_operands(rows, raw, span, seen);
    distrust(map, window + row - 2, row == kFirstInner ? wrong : wrong & kNewest);
    bool cold[2];
    find_cold_segments(cold_tables, seen, span, rows.columns, cold);
    int2 added[2];
    cold_products<ColdOperandOf<T>::kKind>(cold_tables, kBottom, seen, added);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      cold_sum[half].x += cold[half] ? added[half].x : 0;
      cold_sum[half].y += cold[half] ? added[half].y : 0;
      hot_sum[half] += hot_inner(tables, weights, rows, window + row - 2, span, half, cold[half]);
    }
  }
  // Cold sums first, which all columns have; then the others onto them.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = written_column(span, half);
    if (lane_id() % 4 < 2 && column >= first) {
      *reinterpret_cast<int2*>(map.sums() + column) = cold_sum[half];
    }
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column =
        (span * kSpanSegments + half * 8 + result_segment()) * kSegmentWidth + result_column();
    if (column >= first) map.sums()[column] += hot_sum[half];
  }
}

// The first column of a layer whose sum starts anew; its candidates if none.
__device__ int first_rebuilt(const HistoryState& state, int layer) {
  const Map map{state, layer * num_maps(state)};
  if (!is_scored(state, layer)) return map.candidates();
  return progress_of(map.header(), map.num_rows(), map.candidates()).first_rebuilt;
}
__device__ int rebuilt_spans(const HistoryState& state, int layer) {
  const int candidates = num_candidates(state.num_columns[layer]);
  const int first = first_rebuilt(state, layer);
  return first < candidates ? num_spans(candidates) - first / kSpanColumns : 0;
}

__global__ void __launch_bounds__(kHotThreads, 2)
    rebuild_kernel(const CnnTables* from, const HistoryState* states, int rows) {
  __shared__ ColdTables cold_tables;
  __shared__ HotTables tables;
  __shared__ int first_item[kMaxSequences + 1];
  allow_next_kernel();
  number_items(states, rows, rebuilt_spans, first_item);
  wait_for_earlier_kernels();
  if (first_item[rows] == 0) return;
  with_history_type(states[0].type, [&](auto tag) {
    cold_tables.load(*from, ColdOperandOf<typename decltype(tag)::type>::kKind);
  });
  tables.load(*from);
  HotWeights weights;
  weights.load(*from);
  __syncthreads();
  int sequence = 0;
  for (int i = warp_of_grid(); i < first_item[rows]; i += warps_of_grid()) {
    const Item item = find_item(states, first_item, i, &sequence);
    const Map map{states[item.sequence], item.map};
    if (item.unit >= rebuilt_spans(map.state, map.layer())) continue;
    const int first = first_rebuilt(map.state, map.layer());
    with_history_type(map.state.type, [&](auto tag) {
      rebuild_span<typename decltype(tag)::type>(cold_tables, tables, weights, map,
                                                 first / kSpanColumns + item.unit, first);
    });
  }
}

// The tensor cores' fp16 operands and the fixed-point sums hold trained weights (at most about 2)
// with room to spare, and not any number.
void check_range(const PredictorWeights& weights) {
  constexpr float kLargest = 64;
  const auto check = [](std::span<const float> values) {
    for (const float value : values) {
      if (std::abs(value) <= kLargest) continue;
      throw Exception(ErrorCode::kModelFile,
                      "predictor weights: " + std::to_string(value) +
                          " is out of the CUDA predictor's range of -64 .. 64; train them anew, or "
                          "use --device cpu");
    }
  };
  check(weights.conv1_weight);
  check(weights.conv1_bias);
  check(weights.conv2_weight);
  check(weights.conv2_bias);
  check(weights.conv3_weight);
  check({&weights.conv3_bias, 1});
}

}  // namespace

std::unique_ptr<Predictor> make_predictor(const PredictorWeights& weights) {
  check_range(weights);
  return std::make_unique<CudaPredictor>(weights);
}

std::size_t predictor_state_bytes(int max_columns) {
  FT_CHECK(max_columns <= kMaxPredictColumns, max_columns);
  return map_state_bytes(max_columns);
}

void predict(const PredictArgs& args, CudaStream& stream) {
  FT_CHECK(args.rows <= kMaxSequences, args.rows);
  if (args.rows == 0) return;
  static const auto sms = static_cast<unsigned>(num_sms());
  const CnnTables* tables = static_cast<const CudaPredictor*>(args.predictor)->tables();
  const HotLists lists = HotLists::of(args.rows, stream.counters());
  slide_kernel<<<4 * sms, kSlideThreads, 0, stream.handle()>>>(tables, args.states, args.rows,
                                                               lists);
  FT_CUDA(cudaGetLastError());
  launch_overlapped(hot_kernel, 2 * sms, kHotThreads, 0, stream, tables, args.states, args.rows,
                    lists);
  launch_overlapped(rebuild_kernel, 2 * sms, kHotThreads, 0, stream, tables, args.states,
                    args.rows);
  choose_blocks(args, lists.num_lists(args.rows), stream);
}

}  // namespace foretoken::kernels::cuda
