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
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = column - 2 + 2 * i;
    seen.set(i, HistoryPair<T>::scaled(rows.load(upper, at)),
             HistoryPair<T>::scaled(rows.load(lower, at)));
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
    const unsigned wrong = make_operands<T>(raw, seen);
    distrust(map, window + row - 2, row == kFirstInner ? wrong : wrong & kNewest);
    const unsigned cold = find_cold_segments(cold_tables, seen.most, span, rows.columns);
    int2 added[2];
    cold_products<HistoryPair<T>::kCold>(cold_tables, kBottom, seen, added);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_cold = (cold >> half & 1) != 0;
      cold_sum[half].x += is_cold ? added[half].x : 0;
      cold_sum[half].y += is_cold ? added[half].y : 0;
      hot_sum[half] += hot_inner(tables, weights, rows, window + row - 2, span, half, is_cold);
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

// All spans that have such, by all warps of the grid. The listed segments' rows are not added to
// these sums: HotEntry says that they don't slide.
__device__ void rebuild(const CnnTables* from, const HotTables& tables, const HotWeights& weights,
                        const HistoryState* states, int rows) {
  __shared__ ColdTables cold_tables;
  __shared__ int first_item[kMaxPredictSequences + 1];
  number_items(states, rows, rebuilt_spans, first_item);
  with_history_type(states[0].type, [&](auto tag) {
    cold_tables.load(*from, HistoryPair<typename decltype(tag)::type>::kCold);
  });
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
