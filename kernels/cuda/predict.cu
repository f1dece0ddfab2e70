// The predictor on the GPU: the CNN's scores of every map, streamed from step to step, then the
// choice (best_blocks.cu). docs/predictor.md derives the streaming evaluation and the cold regime.
//
//   slide    every span of 64 columns: cold segments' rows that enter, leave and stand at the
//            window's edges; lists the other segments. Bound by reading 10 rows of history.
//   hot      the listed segments, 8 at once, through the whole network on tensor cores. Before
//            these, where there are any, sums that start anew: after prefill, and where columns
//            enter.
//   choose   top-k and union.
// Grids are persistent and read sizes from device memory, so one recorded graph serves every step.
#include <cstddef>

#include "common/check.h"
#include "kernels/cuda/best_blocks.h"
#include "kernels/cuda/cnn.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/history_pair.cuh"
#include "kernels/cuda/hot.cuh"
#include "kernels/cuda/hot_list.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/slide.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kFirstInner = 2;  // window rows 2 .. 61 see no edge of the window
constexpr int kLastInner = kHistoryRows - 3;

class CudaPredictor final : public Predictor {
 public:
  explicit CudaPredictor(const PredictorWeights& weights) : bias_(weights.conv3_bias) {
    const CnnTables tables = make_cnn_tables(weights);
    FT_CUDA(cudaMalloc(reinterpret_cast<void**>(&tables_), sizeof tables));
    FT_CUDA(cudaMemcpy(tables_, &tables, sizeof tables, cudaMemcpyHostToDevice));
  }
  ~CudaPredictor() override { cudaFree(tables_); }
  CudaPredictor(const CudaPredictor&) = delete;
  CudaPredictor& operator=(const CudaPredictor&) = delete;
  const CnnTables* tables() const { return tables_; }
  float bias() const { return bias_; }

 private:
  const float bias_;  // conv3's: it orders nothing, so the sums leave it out
  CnnTables* tables_ = nullptr;
};

// ---- slide -----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kSlideThreads, kSlideCtas)
    slide_kernel(const CnnTables* from, const HistoryState* states, int rows, HotLists lists) {
  // One type serves all sequences of a batch. It is there before the step begins.
  with_history_type(states[0].type, [&](auto tag) {
    run_slide<typename decltype(tag)::type>(from, states, rows, lists);
  });
}

// ---- sums that start anew --------------------------------------------------------------------

// A warp sums up one segment, 16 inner rows at once: lane 4 g + q has rows g and g + 8 of them.
constexpr int kRowsAtOnce = 16;

// What these see of the history, as operands of the cold stencil: of values[i][half], history row i
// of those around row g + 8 half. first: the first row that row 0 sees.
template <typename T>
__device__ void load_cold_rows(const PairRows<T>& rows, std::int64_t first, int segment,
                               ColdRows& out) {
  const int column = segment * kSegmentWidth - 2 + lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kSeenRows; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* row = rows.row(first + lane_id() / 4 + half * 8 + i);
      out.values[i][half] = HistoryPair<T>::cold(rows.load(row, column));
    }
  }
  out.find_most();
}

// s of 8 rows, of which the first one sees rows from `first` on: this lane gets that of row
// result_segment(), column result_column().
template <typename T>
__device__ std::int32_t hot_inner(const HotTables& tables, const HotWeights& weights,
                                  const PairRows<T>& rows, std::int64_t first, int segment) {
  const int q = lane_id() % 4;
  const int column = segment * kSegmentWidth;
  const T* upper_row = rows.row(first + lane_id() / 4 + q);
  const T* lower_row = q < 3 ? rows.row(first + lane_id() / 4 + q + 2) : nullptr;
  std::uint32_t upper[4];
  std::uint32_t lower[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = column - 2 + 2 * i;
    upper[i] = HistoryPair<T>::scaled(rows.load(upper_row, at));
    lower[i] = HistoryPair<T>::scaled(rows.load(lower_row, at));
  }
  return evaluate_hot<HotKind::kInner>(tables, weights, {upper, lower}, column, rows.columns).inner;
}

template <typename T>
__device__ void rebuild_segment(const ColdTables& cold_tables, const HotTables& tables,
                                const HotWeights& weights, const Map& map, int segment) {
  const PairRows<T> rows = rows_of<T>(map);
  const std::int64_t window = map.num_rows() - kHistoryRows;  // its first row
  const bool padded = at_edge(segment * kSegmentWidth, rows.columns);
  int2 cold_sum{};           // of lanes q < 2: columns 2 q and 2 q + 1
  std::int32_t hot_sum = 0;  // of column result_column()
#pragma unroll 1
  for (int row = kFirstInner; row <= kLastInner; row += kRowsAtOnce) {
    const std::int64_t first = window + row - 2;  // that they see
    ColdRows seen;
    load_cold_rows(rows, first, segment, seen);
    const unsigned cold = padded ? 0 : find_cold(cold_tables, seen.most);
    int2 added[2];
    cold_products<HistoryPair<T>::kCold>(cold_tables, kBottom, seen, added);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = half * 8 + lane_id() / 4;
      const bool exists = row + own <= kLastInner;
      if (exists && holds_none<T>(seen.most[half])) {
        unsigned wrong = 0;
#pragma unroll
        for (int i = 0; i < kSeenRows; ++i) {
          wrong |= holds_none<T>(seen.values[i][half]) ? 1U << i : 0U;
        }
        distrust(map, first + own, wrong);
      }
      const bool is_cold = (cold >> half & 1) != 0;
      cold_sum.x += exists && is_cold ? added[half].x : 0;
      cold_sum.y += exists && is_cold ? added[half].y : 0;
      const unsigned hot = __ballot_sync(~0U, exists && !is_cold);
      if (hot == 0) continue;
      const std::int32_t inner = hot_inner(tables, weights, rows, first + half * 8, segment);
      hot_sum += (hot >> (result_segment() * 4) & 1) != 0 ? inner : 0;
    }
  }
  for (int offset = 4; offset < 32; offset *= 2) {
    cold_sum.x += __shfl_xor_sync(~0U, cold_sum.x, offset);
    cold_sum.y += __shfl_xor_sync(~0U, cold_sum.y, offset);
  }
  for (int offset = 1; offset < 8; offset *= 2) {
    hot_sum += __shfl_xor_sync(~0U, hot_sum, offset);
  }
  const int of_lane = result_column() / 2;
  const std::int32_t even = __shfl_sync(~0U, cold_sum.x, of_lane);
  const std::int32_t odd = __shfl_sync(~0U, cold_sum.y, of_lane);
  if (lane_id() % 8 != 0) return;
  const std::int32_t sum = hot_sum + (result_column() % 2 == 0 ? even : odd);
  const int column = segment * kSegmentWidth + result_column();
  // The score, to which other warps add too, holds the sum that was there before.
  atomicSub(map.scores() + column, map.sums()[column]);
  atomicAdd(map.scores() + column, sum);
  map.sums()[column] = sum;
}

// The first column of a layer whose sum starts anew; its candidates if none.
__device__ int first_rebuilt(const HistoryState& state, int layer) {
  const Map map{state, layer * num_maps(state)};
  if (!is_scored(state, layer)) return map.candidates();
  return progress_of(map.header(), map.num_rows(), map.candidates()).first_rebuilt;
}
__device__ int rebuilt_segments(const HistoryState& state, int layer) {
  const int columns = num_candidates(state.num_columns[layer]) - first_rebuilt(state, layer);
  return (columns + kSegmentWidth - 1) / kSegmentWidth;
}

// All segments that have such, by all warps of the grid. The listed segments' rows are not added to
// these sums: HotEntry says that they don't slide.
__device__ void rebuild(const CnnTables* from, const HotTables& tables, const HotWeights& weights,
                        const HistoryState* states, int rows) {
  __shared__ ColdTables cold_tables;
  __shared__ int first_item[kMaxPredictSequences + 1];
  number_items(states, rows, rebuilt_segments, first_item);
  with_history_type(states[0].type, [&](auto tag) {
    cold_tables.load(*from, HistoryPair<typename decltype(tag)::type>::kCold);
  });
  __syncthreads();
  int sequence = 0;
  for (int i = warp_of_grid(); i < first_item[rows]; i += warps_of_grid()) {
    const Item item = find_item(states, first_item, i, &sequence);
    const Map map{states[item.sequence], item.map};
    if (item.unit >= rebuilt_segments(map.state, map.layer())) continue;
    const int first = first_rebuilt(map.state, map.layer()) / kSegmentWidth;
    with_history_type(map.state.type, [&](auto tag) {
      rebuild_segment<typename decltype(tag)::type>(cold_tables, tables, weights, map,
                                                    first + item.unit);
    });
  }
}

// ---- hot -------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kHotThreads, 2)
    hot_kernel(const CnnTables* from, const HistoryState* states, int rows, HotLists lists) {
  __shared__ HotTables tables;
  __shared__ HotView views[kHotThreads / 32][kHotViews];
  extern __shared__ int of_lists[];  // [lists + 1], [lists]
  int* first_task = of_lists;
  int* num_entries = of_lists + lists.num_lists() + 1;
  allow_next_kernel();
  tables.load<kHotThreads>(*from);
  HotWeights weights;
  weights.load(*from);
  wait_for_earlier_kernels();
  const int num_lists = lists.num_lists();
  for (int i = static_cast<int>(threadIdx.x); i < num_lists; i += kHotThreads) {
    num_entries[i] = static_cast<int>(lists.counters[i]);
    first_task[i] = (num_entries[i] + 7) / 8;
  }
  sum_up(num_lists, first_task);
  if (lists.starts_anew() != 0) rebuild(from, tables, weights, states, rows);
  with_history_type(states[0].type, [&](auto tag) {
    run_hot<typename decltype(tag)::type>(tables, weights, lists, states, first_task, num_entries,
                                          views[threadIdx.x / 32]);
  });
}

}  // namespace

std::unique_ptr<Predictor> make_predictor(const PredictorWeights& weights) {
  return std::make_unique<CudaPredictor>(weights);
}

float bias_of(const Predictor& predictor) {
  return static_cast<const CudaPredictor&>(predictor).bias();
}

std::size_t predictor_state_bytes(int max_columns) {
  FT_CHECK(max_columns <= kMaxPredictColumns, max_columns);
  return map_state_bytes(max_columns);
}

void predict(const PredictArgs& args, CudaStream& stream) {
  FT_CHECK(args.rows <= kMaxPredictSequences, args.rows);
  if (args.rows == 0) return;
  static const auto sms = static_cast<unsigned>(num_sms());
  const CnnTables* tables = static_cast<const CudaPredictor*>(args.predictor)->tables();
  const HotLists lists = HotLists::of(args.rows, stream.counters());
  FT_CUDA(cudaFuncSetAttribute(slide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(SlideShared))));
  launch_overlapped(slide_kernel, kSlideCtas * sms, kSlideThreads, sizeof(SlideShared), stream,
                    tables, args.states, args.rows, lists);
  launch_overlapped(hot_kernel, 2 * sms, kHotThreads,
                    sizeof(int) * static_cast<std::size_t>(2 * lists.num_lists() + 1), stream,
                    tables, args.states, args.rows, lists);
  choose_blocks(args, lists.num_counters(), stream);
}

}  // namespace foretoken::kernels::cuda
