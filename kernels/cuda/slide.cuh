// The predictor's slide kernel, by the warp: every span's cold segments' rows that enter, leave and
// stand at the window's edges; lists the segments that are hot.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/hot_list.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/spans.cuh"

namespace foretoken::kernels::cuda {

inline constexpr int kSlideThreads = 256;
inline constexpr int kSlideCtas = 2;  // of an SM

// A warp slides over two spans at a time: while the products of one wait for each other, there are
// those of the other.
inline constexpr int kPairSpans = 2;
inline constexpr int kPairColumns = kPairSpans * kSpanColumns;
inline constexpr int kSlideRows = kNumSides * kSeenRows;
// The side whose hot segments this lane lists.
__device__ inline int listed_side() { return lane_id() % 4 / 2; }
// What a lane gets of the cold stencils' products: of an inner row, of which there are sums, or of
// the edge.
__device__ inline bool has_inner() { return lane_id() % 4 < 2; }

// What a pair of spans sees of the history, kSinkColumns columns before its own and as many after,
// and its sums; in a warp's shared memory. What is no candidate, or before the first row, is 0. A
// copy can leave out its end, not its beginning: the columns before the first candidate are cleared
// later.
inline constexpr int kStagedColumns = kPairColumns + 2 * kSinkColumns;
template <typename T>
struct Staged {
  T rows[kSlideRows][kStagedColumns];
  std::int32_t sums[kPairColumns];
};
// A warp's room for those that are on their way. With more, no CTA of the hot kernel starts beside.
inline constexpr int kStagedBytes = 2 * sizeof(Staged<__nv_bfloat16>);
template <typename T>
inline constexpr int kStages = kStagedBytes / sizeof(Staged<T>);
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
  const T* ring;  // what the first pair sees of row 0
  std::int64_t num_rows;
  std::int32_t* sums;
  std::int32_t* scores;
  std::uint32_t* counter;  // of the list of this lane's side, where it appends
  HotEntry* entries;
  Progress progress;
  unsigned from[Copies::kRounds];  // where this lane's copies begin, of the ring; of the first pair

  __device__ SlideMap(const Map& on, int sequence, const HotLists& lists)
      : map(on),
        rows(rows_of<T>(on)),
        num_rows(on.num_rows()),
        sums(on.sums()),
        scores(on.scores()),
        progress(progress_of(on.header(), num_rows, rows.columns)) {
    ring = rows.ring - kSinkColumns;
    asm volatile("" : "+l"(ring));  // kept: the compiler would compute it for every copy
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
    return has_inner() ? (progress.slides ? (side == kBottom ? 1 : -1) : 0) : 1;
  }
  // For the hot kernel.
  __device__ std::uint32_t step() const {
    return pack_step(place(), static_cast<int>(min(num_rows, std::int64_t{kMostRowsBack})),
                     rows.columns);
  }

  // Starts to bring a pair.
  __device__ void bring(int span, Staged<T>& to) const {
    const auto first = static_cast<unsigned>(span * kSpanColumns);
    auto* at = reinterpret_cast<std::byte*>(to.rows) + lane_id() * Copies::kBytes;
    const auto copy_rows = [&](const auto& copy) {
#pragma unroll
      for (int i = 0; i < Copies::kRounds; ++i) {
        if (Copies::exists(i)) copy(i, at + i * 32 * Copies::kBytes, ring + (from[i] + first));
      }
    };
    if (is_whole(span)) {
      copy_rows([](int, void* to, const T* from) { copy_async<Copies::kBytes>(to, from); });
    } else {
      const int left = rows.columns + kSinkColumns - span * kSpanColumns;  // of a row
      copy_rows([&](int i, void* to, const T* from) {
        const int row = Copies::row(i);
        const bool exists = first_row(row / kSeenRows) + row % kSeenRows >= 0;
        const int values = exists ? min(max(left - Copies::column(i), 0), Copies::kValues) : 0;
        copy_async_part<Copies::kBytes>(to, from, values * static_cast<int>(sizeof(T)));
      });
    }
    // Behind the last span's sums lie the scores.
    constexpr unsigned kSums = 16 / sizeof(std::int32_t);
    static_assert(kPairColumns == 32 * kSums);
    const unsigned column = static_cast<unsigned>(lane_id()) * kSums;
    copy_async<16>(to.sums + column, sums + (first + column));
  }
  static_assert(kBottom == 0 && kTop == 1);

  // All that a pair sees is candidates, in rows that there are; none is the first or the last one.
  __device__ bool is_whole(int span) const {
    return span > 0 && (span + kPairSpans) * kSpanColumns + kSinkColumns <= rows.columns &&
           num_rows >= kMostRowsBack;
  }
  // Of the first pair, when its rows have come.
  __device__ static void clear_sinks(Staged<T>& of) {
    if (lane_id() < kSlideRows) {
#pragma unroll
      for (int i = 0; i < kSinkColumns; ++i) of.rows[lane_id()][i] = T{};
    }
    __syncwarp();
  }

 private:
  // In the ring, of the row that comes next.
  __device__ int place() const {
    return static_cast<int>(static_cast<std::uint32_t>(num_rows) % kRingRows);
  }
};

// Appends the hot segments of `count` spans from `first` on: lane i has slide_pair()'s bits of span
// first + i, or none.
template <typename T>
__device__ void list_hot(const SlideMap<T>& on, int first, int count, unsigned hot) {
  const unsigned of_side = 0x33333333U << (2 * listed_side());  // lanes that speak of this one's
  // Of both sides at once, 16 bits each.
  const auto bits =
      static_cast<unsigned>(__popc(hot & of_side) << (listed_side() == kBottom ? 0 : 16) |
                            __popc(hot & ~of_side) << (listed_side() == kBottom ? 16 : 0));
  const unsigned all = __reduce_add_sync(~0U, bits);
  if (all == 0) return;
  unsigned at = 0;
  if (lane_id() == 0 || lane_id() == 2) {
    at = atomicAdd(on.counter, all >> (listed_side() == kBottom ? 0 : 16) & 0xFFFFU);
  }
  HotEntry* out = on.entries + __shfl_sync(~0U, at, 2 * listed_side());
  const std::uint32_t step = on.step();
  const int own = lane_id() / 4 + lane_id() % 2 * 8;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const unsigned of_span = __shfl_sync(~0U, hot, i) & of_side;
    if ((of_span >> lane_id() & 1) != 0) {
      const int segment = (first + i) * kSpanSegments + own;
      const bool slides = on.progress.slides && segment * kSegmentWidth < on.progress.first_rebuilt;
      out[__popc(of_span & ((1U << lane_id()) - 1))] = {pack_of(on.map.index, segment, slides),
                                                        step};
    }
    out += __popc(of_span);
  }
}

// Spans `span` and, if that is before `end`, the next one. hot[i]: which of span i's segments are
// hot, a bit for each lane, which speaks of side listed_side(), segment g + 8 (q % 2).
template <typename T>
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
            &staged.rows[side * kSeenRows + row][kSinkColumns + read_column(i % kPairSpans)];
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
          *reinterpret_cast<const int2*>(staged.sums + written_column(0) + part * kHalf);
    }
  }
  unsigned cold[kStencils];
#pragma unroll
  for (int i = 0; i < kStencils; ++i) cold[i] = find_cold(tables, most[i]);
  bool is_there[kPairSpans];  // the segment that this lane speaks of
#pragma unroll
  for (bool& there : is_there) there = true;
  if (!on.is_whole(span) || span + kPairSpans > end) {
#pragma unroll
    for (int i = 0; i < kStencils; ++i) {
      cold[i] = leave_padded_out(cold[i], span + i % kPairSpans, on.rows.columns);
    }
#pragma unroll
    for (int i = 0; i < kPairSpans; ++i) {
      is_there[i] = span + i < end && first_column(span + i, lane_id() % 2) < on.rows.columns;
    }
  }
#pragma unroll
  for (int i = 0; i < kPairSpans; ++i) {
    const unsigned listed = listed_side() == kBottom ? cold[i] : cold[kPairSpans + i];
    hot[i] = __ballot_sync(~0U, is_there[i] && (listed >> (lane_id() % 2) & 1) == 0);
  }
#pragma unroll
  for (int i = 0; i < kStencils; ++i) {
    const int side = i / kPairSpans;
    const int of_pair = i % kPairSpans;
    int2 added[2];
    round_products(d[i], added);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int times = (cold[i] >> half & 1) != 0 ? on.factor(side) : 0;
      value[of_pair][half].x += times * added[half].x;
      value[of_pair][half].y += times * added[half].y;
    }
  }
  // The edge's lanes have added it to nothing yet: scores are the sums and it.
  int is_edge = has_inner() ? 0 : 1;
  asm volatile("" : "+r"(is_edge));  // a factor, where the compiler would select
#pragma unroll
  for (int part = 0; part < 2 * kPairSpans; ++part) {
    int2& of = value[part / 2][part % 2];
    const int2 sum = {__shfl_xor_sync(~0U, of.x, 2), __shfl_xor_sync(~0U, of.y, 2)};
    of.x += is_edge * sum.x;
    of.y += is_edge * sum.y;
  }
  std::int32_t* out = (has_inner() ? on.sums : on.scores) + written_column(span);
#pragma unroll
  for (int i = 0; i < kPairSpans; ++i) {
    if (i > 0 && span + i >= end) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<int2*>(out + i * kSpanColumns + half * kHalf) = value[i][half];
    }
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
      const T* at = &staged.rows[kSeenRows - 1][kSinkColumns + read_column(0) + part * kHalf];
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
    if (span == 0) on.clear_sinks(now);
    slide_pair(tables, on, span, end, now, of_pair);
#pragma unroll
    for (int i = 0; i < kPairSpans; ++i) {
      if (lane_id() == span + i - listed) hot = of_pair[i];
    }
    if (span + kPairSpans >= end || span + kPairSpans - listed == 32) {
      list_hot(on, listed, min(end, span + kPairSpans) - listed, hot);
      hot = 0;
      listed = span + kPairSpans;
    }
    stage = stage == kAhead ? 0 : stage + 1;
    __syncwarp();
  }
}

struct SlideShared {
  ColdTables tables;
  int first_span[kMaxPredictSequences + 1];
  alignas(16) std::byte staged[kSlideThreads / 32][kStagedBytes];
};
extern __shared__ uint4 slide_memory[];
__device__ inline SlideShared& slide_shared() {
  return *reinterpret_cast<SlideShared*>(slide_memory);
}

// A warp's share of the spans of all sequences' maps are neighbours. Not inlined: a type's
// registers are then its own, and not those of all types at once.
template <typename T>
__device__ __noinline__ void run_slide(const CnnTables* from, const HistoryState* states, int rows,
                                       const HotLists& lists) {
  SlideShared& shared = slide_shared();
  shared.tables.load(*from, HistoryPair<T>::kCold);
  // Rows, how many there are, and the counters come from the kernel before. Those that follow read
  // some of it before they wait: so they may not start before this one has waited.
  wait_for_earlier_kernels();
  allow_next_kernel();
  number_items(
      states, rows,
      [](const HistoryState& state, int layer) {
        return is_scored(state, layer) ? num_spans(num_candidates(state.num_columns[layer])) : 0;
      },
      shared.first_span);
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
      if (on.progress.first_rebuilt < on.rows.columns && lane_id() == 0) lists.starts_anew() = 1;
      slide_spans<T>(shared.tables, on, item.unit, stop, staged);
    }
    at += item.units - item.unit;
  }
}

}  // namespace foretoken::kernels::cuda
