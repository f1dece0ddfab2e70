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
#include <cstddef>
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
constexpr int kSlideCtas = 2;  // of an SM
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

// Whether either of two cold operands stands for a value that is none.
template <typename T>
__device__ bool holds_none(std::uint32_t pair) {
  constexpr std::uint32_t kGreatest = HistoryPair<T>::kGreatest;
  return (pair & 0xFFFFU) > kGreatest || pair >> 16 > kGreatest;
}

// Of the result, bit i: row i holds a value that is none, among those that this lane reads.
template <typename T>
__device__ unsigned make_operands(const RawColdRows<T>& raw, ColdRows& out) {
#pragma unroll
  for (int i = 0; i < kSeenRows; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) out.values[i][half] = HistoryPair<T>::cold(raw[i][half]);
  }
  out.find_most();
  unsigned wrong_rows = 0;
  if (holds_none<T>(__vmaxu2(out.most[0], out.most[1]))) {
#pragma unroll
    for (int i = 0; i < kSeenRows; ++i) {
      const bool wrong = holds_none<T>(__vmaxu2(out.values[i][0], out.values[i][1]));
      wrong_rows |= wrong ? 1U << i : 0U;
    }
  }
  return wrong_rows;
}

// Of find_cold(), those that are not where the network pads.
__device__ unsigned find_cold_segments(const ColdTables& tables, const std::uint32_t (&seen)[2],
                                       int span, int columns) {
  unsigned cold = find_cold(tables, seen);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = first_column(span, half);
    if (first < columns && at_edge(first, columns)) cold &= ~(1U << half);
  }
  return cold;
}

// ---- slide -----------------------------------------------------------------------------------

// A warp slides over two spans at a time: while the products of one wait for each other, there are
// those of the other.
constexpr int kPairSpans = 2;
constexpr int kPairColumns = kPairSpans * kSpanColumns;
constexpr int kSlideRows = kNumSides * kSeenRows;
// The side whose hot segments this lane lists.
__device__ int listed_side() { return lane_id() % 4 / 2; }
// What a lane gets of cold_products(): of an inner row, of which there are sums, or of the edge.
__device__ bool has_inner() { return lane_id() % 4 < 2; }

// What a pair of spans sees of the history, kSinkColumns columns before its own and as many after,
// and its sums; in a warp's shared memory. What is no candidate, or before the first row, is 0.
constexpr int kStagedColumns = kPairColumns + 2 * kSinkColumns;
template <typename T>
struct Staged {
  T rows[kSlideRows][kStagedColumns];
  std::int32_t sums[kPairColumns];
};
// A warp's room for those that are on their way. With more, no CTA of the hot kernel starts beside.
constexpr int kStagedBytes = 2 * sizeof(Staged<__nv_bfloat16>);
template <typename T>
constexpr int kStages = kStagedBytes / sizeof(Staged<T>);
static_assert(kStages<float> >= 1);

// How the lanes of a warp bring a pair's rows: copy 32 i + lane, of those of all rows one after the
// other, is this lane's i-th.
template <typename T>
struct SlideCopies {
  static constexpr int kBytes = sizeof(T) == 1 ? 8 : 16;
  static constexpr int kValues = kBytes / sizeof(T);
  static constexpr int kOfRow = kStagedColumns / kValues;
  static constexpr int kAll = kSlideRows * kOfRow;
  static constexpr int kRounds = (kAll + 31) / 32;
  static_assert(kStagedColumns % kValues == 0);

  __device__ static int row(int i) { return (32 * i + lane_id()) / kOfRow; }
  __device__ static int column(int i) { return (32 * i + lane_id()) % kOfRow * kValues; }
  __device__ static bool exists(int i) { return 32 * i + 32 <= kAll || 32 * i + lane_id() < kAll; }
};

// A map, as a warp slides over its spans. Holds what it would else look up for every span.
template <typename T>
struct SlideMap {
  using Copies = SlideCopies<T>;
  Map map;
  PairRows<T> rows;
  std::int64_t num_rows;
  std::int32_t* sums;
  std::int32_t* boundary;
  std::uint32_t* counter;  // of the list of this lane's side, where it appends
  std::uint32_t* entries;
  bool slides;
  unsigned from[Copies::kRounds];  // where this lane's copies begin, of the ring; of the first pair

  __device__ SlideMap(const Map& on, int sequence, const HotLists& lists)
      : map(on),
        rows(rows_of<T>(on)),
        num_rows(on.num_rows()),
        sums(on.sums()),
        boundary(on.boundary()),
        slides(progress_of(on.header(), num_rows, rows.columns).slides) {
    const int list = lists.list(sequence, on.index, listed_side());
    counter = lists.counters + list;
    entries = lists.entries(on.state, list);
    const int next = place();
#pragma unroll
    for (int i = 0; i < Copies::kRounds; ++i) {
      const int row = Copies::row(i);
      const int back = row < kSeenRows ? kSeenRows - row : kMostRowsBack + kSeenRows - row;
      const int of_ring = next - back + (next < back ? kRingRows : 0);
      from[i] = static_cast<unsigned>(of_ring * rows.pitch + Copies::column(i));
    }
  }

  __device__ std::int64_t first_row(int side) const {
    return num_rows - (side == kBottom ? kSeenRows : kMostRowsBack);
  }
  // What this lane's part of a row adds to a sum, or to the edge.
  __device__ int factor(int side) const {
    return has_inner() ? (slides ? (side == kBottom ? 1 : -1) : 0) : 1;
  }
  // For the hot kernel.
  __device__ void note_step() const {
    const auto back = static_cast<std::int32_t>(min(num_rows, std::int64_t{kMostRowsBack}));
    map.header().step = {place(), back, rows.columns};
  }

  // Starts to bring a pair: of one that is not whole, also what is to be cleared.
  __device__ void bring(int span, Staged<T>& to) const {
    const T* ring = rows.ring - kSinkColumns;
    const auto first = static_cast<unsigned>(span * kSpanColumns);
    auto* at = reinterpret_cast<std::byte*>(to.rows) + lane_id() * Copies::kBytes;
    const auto copy_rows = [&](const auto& is_there) {
#pragma unroll
      for (int i = 0; i < Copies::kRounds; ++i) {
        if (!Copies::exists(i) || !is_there(i)) continue;
        copy_async<Copies::kBytes>(at + i * 32 * Copies::kBytes, ring + (from[i] + first));
      }
      // Behind the last span's sums lies the boundary.
      constexpr unsigned kSums = 16 / sizeof(std::int32_t);
      static_assert(kPairColumns == 32 * kSums);
      const unsigned column = static_cast<unsigned>(lane_id()) * kSums;
      copy_async<16>(to.sums + column, sums + (first + column));
    };
    const int left = rows.pitch - span * kSpanColumns;  // of a row
    if (left >= kStagedColumns) {
      copy_rows([](int) { return true; });
    } else {
      copy_rows([&](int i) { return Copies::column(i) < left; });
    }
  }
  static_assert(kBottom == 0 && kTop == 1);

  // All that a pair sees is candidates, in rows that there are; none is the first or the last one.
  __device__ bool is_whole(int span) const {
    return span > 0 && (span + kPairSpans) * kSpanColumns + kSinkColumns <= rows.columns &&
           num_rows >= kMostRowsBack;
  }
  // Of a pair whose rows have come, what is not.
  __device__ void clear_others(int span, Staged<T>& of) const {
    const int first = span * kSpanColumns - kSinkColumns;
    const int begin = max(0, -first);
    const int end = max(begin, min(kStagedColumns, rows.columns - first));
#pragma unroll 1
    for (int row = 0; row < kSlideRows; ++row) {
      const bool exists = first_row(row / kSeenRows) + row % kSeenRows >= 0;
      const int stop = exists ? begin : kStagedColumns;
      for (int i = lane_id(); i < stop; i += 32) of.rows[row][i] = T{};
      for (int i = end + lane_id(); i < kStagedColumns; i += 32) of.rows[row][i] = T{};
    }
    __syncwarp();
  }

 private:
  // In the ring, of the row that comes next.
  __device__ int place() const {
    return static_cast<int>(static_cast<std::uint32_t>(num_rows) % kRingRows);
  }
};

// Of slide_pair()'s bits, the lanes that speak of a side.
__device__ unsigned lanes_of(int side) { return 0x33333333U << (2 * side); }

// Appends the hot segments of up to 32 spans from `first` on: lane i has slide_pair()'s bits of
// span first + i, or none.
template <typename T>
__device__ void list_hot(const SlideMap<T>& on, int first, unsigned hot) {
  const unsigned of_lane_side = lanes_of(listed_side());
  // Sums of both sides at once, 16 bits each.
  const auto count =
      static_cast<unsigned>(__popc(hot & lanes_of(kBottom)) | __popc(hot & lanes_of(kTop)) << 16);
  const unsigned through = warp_inclusive_sum(count);
  const unsigned all = __shfl_sync(~0U, through, 31);
  if (all == 0) return;
  const int shift = listed_side() == kBottom ? 0 : 16;
  unsigned at = 0;
  if (lane_id() == 0 || lane_id() == 2) at = atomicAdd(on.counter, all >> shift & 0xFFFFU);
  at = __shfl_sync(~0U, at, listed_side() * 2);
  const unsigned before = through - count;
  for (unsigned spans = __ballot_sync(~0U, hot != 0); spans != 0; spans &= spans - 1) {
    const int i = __ffs(static_cast<int>(spans)) - 1;
    const unsigned of_span = __shfl_sync(~0U, hot, i);
    const unsigned start = at + (__shfl_sync(~0U, before, i) >> shift & 0xFFFFU);
    if ((of_span >> lane_id() & 1) == 0) continue;
    const auto place =
        static_cast<unsigned>(__popc(of_span & of_lane_side & ((1U << lane_id()) - 1)));
    on.entries[start + place] =
        hot_entry(on.map.index, first_column(first + i, lane_id() % 2) / kSegmentWidth, on.slides);
  }
}

// Spans `span` and, if that is before `end`, the next one. hot[i]: which of span i's segments are
// hot, a bit for each lane, which speaks of side listed_side(), segment g + 8 (q % 2). kWhole:
// is_whole(), and both spans are there.
template <typename T, bool kWhole>
__device__ void slide_pair(const ColdTables& tables, const SlideMap<T>& on, int span, int end,
                           const Staged<T>& staged, unsigned (&hot)[kPairSpans]) {
  using Pair = HistoryPair<T>;
  constexpr int kStencils = kNumSides * kPairSpans;  // those of a side are neighbours
  constexpr int kHalf = kSpanColumns / 2;
  float d[kStencils][4];
  std::uint32_t most[kStencils][2] = {};
#pragma unroll
  for (int i = 0; i < kStencils; ++i) {
    const float at_zero = tables.at_zero[i / kPairSpans][listed_side()];
#pragma unroll
    for (float& value : d[i]) value = at_zero;
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    uint4 taps[kStencils];
    std::uint32_t a[kStencils][4] = {};
#pragma unroll
    for (int i = 0; i < kStencils; ++i) {
      const int side = i / kPairSpans;
      taps[i] = tables.taps[side][k][lane_id()];
#pragma unroll
      for (int row = 2 * k; row < min(2 * k + 2, kSeenRows); ++row) {
        const T* at =
            &staged.rows[side * kSeenRows + row][kSinkColumns + read_column(i % kPairSpans, 0)];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[i][row % 2 * 2 + half] = Pair::cold(Pair::read(at + half * kHalf));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        most[i][half] = __vimax3_u16x2(most[i][half], a[i][half], a[i][2 + half]);
      }
    }
    add_cold_products<Pair::kCold>(taps, a, d);
  }

  int2 value[kPairSpans][2] = {};
  if (has_inner()) {
#pragma unroll
    for (int part = 0; part < 2 * kPairSpans; ++part) {
      value[part / 2][part % 2] =
          *reinterpret_cast<const int2*>(staged.sums + written_column(0, 0) + part * kHalf);
    }
  }
  bool is_hot[kPairSpans];  // what this lane speaks of
#pragma unroll
  for (int i = 0; i < kStencils; ++i) {
    const int side = i / kPairSpans;
    const int of_pair = i % kPairSpans;
    const unsigned cold =
        kWhole ? find_cold(tables, most[i])
               : find_cold_segments(tables, most[i], span + of_pair, on.rows.columns);
    if (side == listed_side()) is_hot[of_pair] = (cold >> (lane_id() % 2) & 1) == 0;
    int2 added[2];
    round_products(d[i], added);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int times = (cold >> half & 1) != 0 ? on.factor(side) : 0;
      value[of_pair][half].x += times * added[half].x;
      value[of_pair][half].y += times * added[half].y;
    }
  }
  std::int32_t* out = (has_inner() ? on.sums : on.boundary) + written_column(span, 0);
#pragma unroll
  for (int i = 0; i < kPairSpans; ++i) {
    const bool exists = kWhole || span + i < end;
    if (exists) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<int2*>(out + i * kSpanColumns + half * kHalf) = value[i][half];
      }
    }
    const int first = first_column(span + i, lane_id() % 2);
    hot[i] = __ballot_sync(~0U, is_hot[i] && exists && (kWhole || first < on.rows.columns));
  }

  // Of what is none of [0, 2]: rows but the newest were checked before.
  static_assert(kBottom == 0);
  std::uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kPairSpans; ++i) seen = __vimax3_u16x2(seen, most[i][0], most[i][1]);
  if (holds_none<T>(seen)) {
    std::uint32_t newest = 0;
#pragma unroll
    for (int part = 0; part < 2 * kPairSpans; ++part) {
      const T* at = &staged.rows[kSeenRows - 1][kSinkColumns + read_column(0, 0) + part * kHalf];
      newest = __vmaxu2(newest, Pair::cold(Pair::read(at)));
    }
    if (holds_none<T>(newest)) distrust(on.map, on.first_row(kBottom), kNewest);
  }
}

// Spans [first, end) of a map. Rows are brought kStages - 1 pairs ahead of their turn.
template <typename T>
__device__ void slide_spans(const ColdTables& tables, const SlideMap<T>& on, int first, int end,
                            Staged<T>* staged) {
  constexpr int kAhead = kStages<T> - 1;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first + i * kPairSpans < end) on.bring(first + i * kPairSpans, staged[i]);
    commit_copies();  // an empty group where there are no more
  }
  unsigned hot = 0;  // of the spans since `listed`, one a lane
  int listed = first;
  int stage = 0;
#pragma unroll 1
  for (int span = first; span < end; span += kPairSpans) {
    const int ahead = span + kAhead * kPairSpans;
    if (ahead < end) on.bring(ahead, staged[stage == 0 ? kAhead : stage - 1]);
    commit_copies();
    wait_copies<kAhead>();
    __syncwarp();
    Staged<T>& now = staged[stage];
    unsigned of_pair[kPairSpans];
    if (on.is_whole(span) && span + kPairSpans <= end) {
      slide_pair<T, true>(tables, on, span, end, now, of_pair);
    } else {
      on.clear_others(span, now);
      slide_pair<T, false>(tables, on, span, end, now, of_pair);
    }
#pragma unroll
    for (int i = 0; i < kPairSpans; ++i) {
      if (lane_id() == span + i - listed) hot = of_pair[i];
    }
    if (span + kPairSpans >= end || span + kPairSpans - listed == 32) {
      list_hot(on, listed, hot);
      hot = 0;
      listed = span + kPairSpans;
    }
    stage = stage == kAhead ? 0 : stage + 1;
    __syncwarp();
  }
}

struct SlideShared {
  ColdTables tables;
  int first_span[kMaxSequences + 1];
  alignas(16) std::byte staged[kSlideThreads / 32][kStagedBytes];
};
extern __shared__ uint4 slide_memory[];
__device__ SlideShared& slide_shared() { return *reinterpret_cast<SlideShared*>(slide_memory); }

// A warp's share of the spans of all sequences' maps are neighbours. Not inlined: a type's
// registers are then its own, and not those of all types at once.
template <typename T>
__device__ __noinline__ void run_slide(const CnnTables* from, const HistoryState* states, int rows,
                                       const HotLists& lists) {
  SlideShared& shared = slide_shared();
  shared.tables.load(*from, HistoryPair<T>::kCold);
  __syncthreads();
  auto* staged = reinterpret_cast<Staged<T>*>(shared.staged[threadIdx.x / 32]);
  const int all = shared.first_span[rows];
  const int each = (all + warps_of_grid() - 1) / warps_of_grid();
  const int share = (each + kPairSpans - 1) / kPairSpans * kPairSpans;
  int at = warp_of_grid() * share;
  const int end = min(at + share, all);
  int sequence = 0;
  while (at < end) {
    const Item item = find_item(states, shared.first_span, at, &sequence);
    const Map map{states[item.sequence], item.map};
    const int spans = is_scored(map.state, map.layer()) ? num_spans(map.candidates()) : 0;
    const int stop = min(spans, item.unit + end - at);
    if (item.unit < stop) {
      const SlideMap<T> on(map, item.sequence, lists);
      if (item.unit == 0 && lane_id() == 0) on.note_step();
      slide_spans<T>(shared.tables, on, item.unit, stop, staged);
    }
    at += item.units - item.unit;
  }
}

__global__ void __launch_bounds__(kSlideThreads, kSlideCtas)
    slide_kernel(const CnnTables* from, const HistoryState* states, int rows, HotLists lists) {
  allow_next_kernel();
  number_items(
      states, rows,
      [](const HistoryState& state, int layer) {
        return is_scored(state, layer) ? num_spans(num_candidates(state.num_columns[layer])) : 0;
      },
      slide_shared().first_span);
  // One type serves all sequences of a batch.
  with_history_type(states[0].type, [&](auto tag) {
    run_slide<typename decltype(tag)::type>(from, states, rows, lists);
  });
}

// ---- hot -------------------------------------------------------------------------------------

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

__global__ void __launch_bounds__(kHotThreads, 2)
    hot_kernel(const CnnTables* from, const HistoryState* states, int rows, HotLists lists) {
  __shared__ HotTables tables;
  __shared__ int first_task[kMaxSequences * kNumSides + 1];
  __shared__ int num_entries[kMaxSequences * kNumSides];
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
  with_history_type(states[0].type, [&](auto tag) {
    run_hot<typename decltype(tag)::type>(tables, weights, lists, states, first_task, num_entries);
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
    cold_tables.load(*from, HistoryPair<typename decltype(tag)::type>::kCold);
  });
  tables.load<kHotThreads>(*from);
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
  FT_CUDA(cudaFuncSetAttribute(slide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(SlideShared))));
  slide_kernel<<<kSlideCtas * sms, kSlideThreads, sizeof(SlideShared), stream.handle()>>>(
      tables, args.states, args.rows, lists);
  FT_CUDA(cudaGetLastError());
  launch_overlapped(hot_kernel, 2 * sms, kHotThreads, 0, stream, tables, args.states, args.rows,
                    lists);
  launch_overlapped(rebuild_kernel, 2 * sms, kHotThreads, 0, stream, tables, args.states,
                    args.rows);
  choose_blocks(args, lists.num_lists(), stream);
}

}  // namespace foretoken::kernels::cuda
