// Top-k of a map's scores, and the union over the maps of a KV head: one CTA a KV head.
//
// A candidate's rank is a 56-bit number, unique within a map: its score as an unsigned integer,
// then its column, the lower the better.
//   list        the candidates that reach a bound, in one pass over all scores. The bound is what
//               nearly twice top_k reached a step ago (MapHeader::bound), and scores move slowly.
//   threshold   which exactly top_k reach: by bisection in the list, a warp a map. Where there is
//               no such list (a first step, scores that jumped, a top_k too large for it), by radix
//               selection among all candidates, a map after the other.
//   union       a bit a candidate; of too many the best, by the best of the maps that want it.
#include "common/check.h"
#include "kernels/cuda/best_blocks.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/map_state.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kHeld = 16;        // ranks that a thread keeps in registers: 8,192 columns
constexpr int kListed = 2048;    // candidates in the lists of a KV head's maps
constexpr int kMaxUnion = 2048;  // candidates of a union whose best ranks are kept
constexpr int kMaskWords = kMaxPredictColumns / 32;
constexpr int kColumnBits = 24;
constexpr std::uint64_t kColumnMask = (1U << kColumnBits) - 1;
constexpr int kRankBits = 32 + kColumnBits;
constexpr std::uint64_t kLatest = 0;  // score bits of a column that was chosen as a late one

using Rank = std::uint64_t;

__device__ Rank rank_of(std::uint32_t score, int column) {
  return (static_cast<Rank>(score) << kColumnBits) |
         (kColumnMask - static_cast<std::uint32_t>(column));
}

__device__ int column_of(Rank rank) { return static_cast<int>(kColumnMask - (rank & kColumnMask)); }

// A sum past int32 is a mean of s past 8, which no attention has: it counts as the greatest.
__device__ std::uint32_t score_bits(std::int32_t inner, std::int32_t edge) {
  std::int32_t sum;
  asm("add.sat.s32 %0, %1, %2;" : "=r"(sum) : "r"(inner), "r"(edge));
  return static_cast<std::uint32_t>(max(sum, -std::numeric_limits<std::int32_t>::max())) ^
         0x80000000U;
}
__device__ std::uint32_t score_bits(const Map& map, int column) {
  return score_bits(map.sums()[column], map.boundary()[column]);
}

// What a map of the KV head wants.
struct MapChoice {
  bool usable;          // else it wants its latest candidates
  bool is_listed;       // all that it wants is in its list
  std::uint32_t bound;  // on the score; 0 lists all
  int count;            // of the candidates that reach the bound, in the list or not
  Rank threshold;       // it wants the ranks from here on
};

struct Shared {
  int first_item[kMaxPredictSequences + 1];
  std::uint32_t wanted[kMaskWords];  // a bit a candidate: the union
  std::uint16_t before[kMaskWords];  // bits in the words before
  std::uint32_t best[kMaxUnion];     // scores of the union's candidates
  Rank listed[kListed];              // [maps, kListed / maps]
  MapChoice maps[kMaxMaps];
  Rank limit_threshold;  // of a union with too many
  int histogram[256];
  unsigned long long most;    // the greatest of all
  std::uint32_t least_score;  // of the threads' own greatest
  int num_threads;            // that have one
  Rank prefix;                // of radix selection
  int still;                  // ranks to choose among those with the prefix
  int of_bin;                 // ranks that have it
  int warp_total[kWarps];
};

// ranks.for_each(f): calls f(rank) for those of this thread. All threads of the CTA call these.

// The bin that holds the shared.still-th greatest rank: extends the prefix by it. By one warp.
__device__ void pick_bin(Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x);
  int count = 0;  // of this lane's 8 bins; lane 0 has the greatest
  for (int i = 0; i < 8; ++i) count += shared.histogram[255 - lane * 8 - i];
  const int through = warp_inclusive_sum(count);
  const int still = shared.still;
  __syncwarp();
  int before = through - count;
  if (still <= before || still > through) return;
  for (int bin = 255 - lane * 8;; --bin) {
    const int of_bin = shared.histogram[bin];
    if (before + of_bin >= still) {
      shared.prefix = (shared.prefix << 8) | static_cast<std::uint32_t>(bin);
      shared.still = still - before;
      shared.of_bin = of_bin;
      return;
    }
    before += of_bin;
  }
}

// A number that at least k ranks reach, if k threads have one: nearly the k-th greatest of the
// threads' own maxima, found in two histograms of their scores. 0 where k is too great for that.
template <typename Ranks>
__device__ Rank lower_bound(const Ranks& ranks, int k, Shared& shared, Rank* most) {
  const int tid = static_cast<int>(threadIdx.x);
  Rank mine = 0;
  ranks.for_each([&](Rank rank) { mine = max(mine, rank); });
  const auto score = static_cast<std::uint32_t>(mine >> kColumnBits);
  const bool has_one = mine != 0;
  if (tid == 0) {
    shared.most = 0;
    shared.least_score = ~0U;
    shared.num_threads = 0;
  }
  __syncthreads();
  const unsigned with_one = __ballot_sync(~0U, has_one);
  const std::uint32_t warp_least = __reduce_min_sync(~0U, has_one ? score : ~0U);
  for (int offset = 16; offset > 0; offset /= 2) {
    mine = max(mine, __shfl_xor_sync(~0U, mine, offset));
  }
  if (tid % 32 == 0 && with_one != 0) {
    atomicMax(&shared.most, mine);
    atomicMin(&shared.least_score, warp_least);
    atomicAdd(&shared.num_threads, __popc(with_one));
  }
  __syncthreads();
  *most = shared.most;
  const std::uint32_t least = shared.least_score;
  if (shared.num_threads < k) {
    __syncthreads();
    return 0;
  }
  const std::uint32_t range = static_cast<std::uint32_t>(*most >> kColumnBits) - least;
  int shift = max(0, 32 - __clz(static_cast<int>(range)) - 8);
  __syncthreads();
  if (tid == 0) {
    shared.prefix = 0;
    shared.still = k;
  }
  for (int round = 0;; ++round) {
    if (tid < 256) shared.histogram[tid] = 0;
    __syncthreads();
    const Rank prefix = shared.prefix;
    if (has_one && (round == 0 || (score - least) >> (shift + 8) == prefix)) {
      atomicAdd(&shared.histogram[(score - least) >> shift & 255], 1);
    }
    __syncthreads();
    if (tid < 32) pick_bin(shared);
    __syncthreads();
    if (round == 1 || shift < 8) break;
    shift -= 8;
  }
  const Rank bound = static_cast<Rank>(least + (static_cast<std::uint32_t>(shared.prefix) << shift))
                     << kColumnBits;
  __syncthreads();
  return bound;
}

// A number that exactly k ranks reach. REQUIRES: there are more than k.
template <typename Ranks>
__device__ Rank kth_greatest(const Ranks& ranks, int k, Shared& shared) {
  Rank most = 0;
  const Rank bound = lower_bound(ranks, k, shared, &most);
  int shift = kRankBits - 8;
  while (shift > 0 && (most >> shift) == (bound >> shift)) shift -= 8;
  if (threadIdx.x == 0) {
    shared.prefix = most >> (shift + 8);
    shared.still = k;
  }
  for (;; shift -= 8) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    const Rank prefix = shared.prefix;
    ranks.for_each([&](Rank rank) {
      if (rank >= bound && rank >> (shift + 8) == prefix) {
        atomicAdd(&shared.histogram[(rank >> shift) & 255], 1);
      }
    });
    __syncthreads();
    if (threadIdx.x < 32) pick_bin(shared);
    __syncthreads();
    if (shift == 0 || shared.of_bin == shared.still) {
      // Of the last bin, only what passed the filter was counted.
      const Rank threshold = max(shared.prefix << shift, bound);
      __syncthreads();
      return threshold;
    }
  }
}

// The ranks of one map. The first columns' stay in registers.
class MapRanks {
 public:
  __device__ explicit MapRanks(const Map& map) : map_(map), columns_(map.candidates()) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = i * kThreads + static_cast<int>(threadIdx.x);
      held_[i] = column < columns_ ? score_bits(map, column) : 0;
    }
  }
  template <typename F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = i * kThreads + static_cast<int>(threadIdx.x);
      if (column < columns_) f(rank_of(held_[i], column));
    }
    for (int column = kHeld * kThreads + static_cast<int>(threadIdx.x); column < columns_;
         column += kThreads) {
      f(rank_of(score_bits(map_, column), column));
    }
  }

 private:
  const Map& map_;
  int columns_;
  std::uint32_t held_[kHeld];
};

// The maps of one KV head.
struct Head {
  const HistoryState& state;
  int first_map;  // index among all layers' maps
  int columns;    // candidates

  __device__ Map map(int i) const { return {state, first_map + i}; }
  __device__ int maps() const { return state.maps_per_kv_head; }
};

// The ranks of the union: of a column, the best of the maps that want it.
struct UnionRanks {
  const Head& head;
  const Shared& shared;

  template <typename F>
  __device__ void for_each(const F& f) const {
    const int words = (head.columns + 31) / 32;
    for (int word = static_cast<int>(threadIdx.x); word < words; word += kThreads) {
      for (std::uint32_t bits = shared.wanted[word]; bits != 0; bits &= bits - 1) {
        f(best(word * 32 + __ffs(static_cast<int>(bits)) - 1));
      }
    }
  }
  __device__ Rank best(int column) const {
    Rank most = rank_of(kLatest, column);
    for (int m = 0; m < head.maps(); ++m) {
      if (!shared.maps[m].usable) continue;
      const Rank rank = rank_of(score_bits(head.map(m), column), column);
      if (rank >= shared.maps[m].threshold) most = max(most, rank);
    }
    return most;
  }
};

// ---- lists -----------------------------------------------------------------------------------

__device__ int list_room(const Head& head) { return kListed / head.maps(); }
__device__ Rank* list_of(const Head& head, int m, Shared& shared) {
  return shared.listed + m * list_room(head);
}

// Lists what reaches the bounds of the maps that may be listed.
__device__ void list_candidates(const Head& head, Shared& shared) {
  const int room = list_room(head);
  for (int m = 0; m < head.maps(); ++m) {
    MapChoice& choice = shared.maps[m];
    if (!choice.is_listed) continue;
    const Map map = head.map(m);
    const auto* sums = reinterpret_cast<const int4*>(map.sums());
    const auto* boundary = reinterpret_cast<const int4*>(map.boundary());
    const std::uint32_t bound = choice.bound;
    const auto add = [&](std::int32_t inner, std::int32_t edge, int column) {
      const std::uint32_t score = score_bits(inner, edge);
      if (score < bound || column >= head.columns) return;
      const int at = atomicAdd(&choice.count, 1);
      if (at < room) list_of(head, m, shared)[at] = rank_of(score, column);
    };
    // All loads of a batch are under way before the first is looked at.
    constexpr int kBatch = 4;
    const int fours = (head.columns + 3) / 4;
    for (int first = static_cast<int>(threadIdx.x); first < fours; first += kBatch * kThreads) {
      int4 inner[kBatch];
      int4 edge[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = min(first + b * kThreads, fours - 1);
        inner[b] = sums[i];
        edge[b] = boundary[i];
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kThreads;
        if (i >= fours) break;
        add(inner[b].x, edge[b].x, i * 4);
        add(inner[b].y, edge[b].y, i * 4 + 1);
        add(inner[b].z, edge[b].z, i * 4 + 2);
        add(inner[b].w, edge[b].w, i * 4 + 3);
      }
    }
  }
}

// A number that exactly k of `count` different ranks reach, rank_at(i), by one warp.
// REQUIRES: count >= k > 0.
template <typename RankAt>
__device__ Rank kth_greatest_of(const RankAt& rank_at, int count, int k) {
  Rank low = ~Rank{0};  // at least k reach it
  Rank high = 0;        // fewer do
  for (int i = lane_id(); i < count; i += 32) {
    low = min(low, rank_at(i));
    high = max(high, rank_at(i));
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    low = min(low, __shfl_xor_sync(~0U, low, offset));
    high = max(high, __shfl_xor_sync(~0U, high, offset));
  }
  ++high;
  if (count == k) return low;
  for (;;) {
    const Rank middle = low + (high - low) / 2;
    int reach = 0;
#pragma unroll 4
    for (int i = lane_id(); i < count; i += 32) reach += rank_at(i) >= middle ? 1 : 0;
    reach = __reduce_add_sync(~0U, reach);
    if (reach == k) return middle;
    (reach > k ? low : high) = middle;
  }
}

// The score that the next step's list starts at: as far below the threshold as this one's, half or
// twice as far where that lists too much or too little.
__device__ std::uint32_t next_bound(const MapChoice& choice, int k) {
  const auto score = static_cast<std::uint32_t>(choice.threshold >> kColumnBits);
  std::uint32_t gap = score - choice.bound;
  if (choice.count > 2 * k) gap /= 2;
  if (choice.count < k + k / 4) gap = min(gap, 1U << 30) * 2 + 1;
  return score - min(gap, score);
}

// ---- one map ---------------------------------------------------------------------------------

__device__ void begin_map(const Head& head, int m, Shared& shared) {
  const Map map = head.map(m);
  MapChoice& choice = shared.maps[m];
  const int k = head.state.top_k;
  choice = {};
  choice.usable = head.columns > k && map.is_clean();
  if (!choice.usable && head.columns > k) atomicAdd(head.state.fallbacks, 1U);
  choice.bound = map.header().bound;
  const bool known = choice.bound != 0 || head.columns <= list_room(head);
  choice.is_listed = choice.usable && known && k <= list_room(head);
}

// Of a map with a list: whether that holds enough, the threshold, the next bound. By one warp.
__device__ void choose_in_list(const Head& head, int m, Shared& shared) {
  MapChoice& choice = shared.maps[m];
  const int k = head.state.top_k;
  const bool fits = choice.count >= k && choice.count <= list_room(head);
  __syncwarp();
  if (!fits) {
    if (lane_id() == 0) choice.is_listed = false;
    return;
  }
  const Rank* list = list_of(head, m, shared);
  const Rank threshold = kth_greatest_of([&](int i) { return list[i]; }, choice.count, k);
  if (lane_id() == 0) {
    choice.threshold = threshold;
    head.map(m).header().bound = next_bound(choice, k);
  }
}

// Of a map without one, by all threads. Rare, so out of the others' way.
__device__ __noinline__ void choose_among_all(const Head& head, int m, Shared& shared) {
  const Map map = head.map(m);
  const MapRanks ranks(map);
  const int k = head.state.top_k;
  const Rank threshold = kth_greatest(ranks, k, shared);
  if (threadIdx.x == 0) shared.maps[m].threshold = threshold;
  const int listed = k + k / 2;
  if (listed > list_room(head) || listed >= head.columns) return;
  const Rank bound = kth_greatest(ranks, listed, shared);
  if (threadIdx.x == 0) map.header().bound = static_cast<std::uint32_t>(bound >> kColumnBits);
}

// Calls f(rank) for those ranks that a map wants and that are this thread's.
template <typename F>
__device__ void for_each_wanted(const Head& head, int m, Shared& shared, const F& f) {
  const MapChoice& choice = shared.maps[m];
  const int tid = static_cast<int>(threadIdx.x);
  if (!choice.usable) {
    const int first = max(0, head.columns - head.state.top_k);
    for (int c = first + tid; c < head.columns; c += kThreads) f(rank_of(kLatest, c));
  } else if (choice.is_listed) {
    const Rank* list = list_of(head, m, shared);
    for (int i = tid; i < choice.count; i += kThreads) {
      if (list[i] >= choice.threshold) f(list[i]);
    }
  } else {
    const Map map = head.map(m);
    for (int c = tid; c < head.columns; c += kThreads) {
      const Rank rank = rank_of(score_bits(map, c), c);
      if (rank >= choice.threshold) f(rank);
    }
  }
}

// ---- the union -------------------------------------------------------------------------------

// Sum of a value over the threads before this one; *total over all.
__device__ int sum_before(int value, Shared& shared, int* total) {
  __syncthreads();  // an earlier call's totals have been read
  return inclusive_sum<kThreads>(value, shared.warp_total, total) - value;
}

// This thread's words of the union, which are in order with those of other threads.
struct Words {
  int first;
  int end;
};
__device__ Words own_words(int columns) {
  const int words = (columns + 31) / 32;
  const int each = (words + kThreads - 1) / kThreads;
  const int first = min(words, static_cast<int>(threadIdx.x) * each);
  return {first, min(words, first + each)};
}
__device__ int count_wanted(int columns, const Shared& shared) {
  const Words words = own_words(columns);
  int count = 0;
  for (int w = words.first; w < words.end; ++w) count += __popc(shared.wanted[w]);
  return count;
}

// Counts the union; shared.before is right after it.
__device__ int count_union(int columns, Shared& shared) {
  int total = 0;
  int before = sum_before(count_wanted(columns, shared), shared, &total);
  const Words words = own_words(columns);
  for (int w = words.first; w < words.end; ++w) {
    shared.before[w] = static_cast<std::uint16_t>(before);
    before += __popc(shared.wanted[w]);
  }
  __syncthreads();
  return total;
}

// Where a candidate of the union stands in it.
__device__ int place_in_union(int column, const Shared& shared) {
  const std::uint32_t lower = (1U << (column % 32)) - 1;
  return shared.before[column / 32] + __popc(shared.wanted[column / 32] & lower);
}

// Leaves the `limit` best of the union. REQUIRES: there are more.
__device__ void truncate(const Head& head, int total, int limit, Shared& shared) {
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kThreads) shared.best[i] = 0;
  __syncthreads();
  for (int m = 0; m < head.maps(); ++m) {
    for_each_wanted(head, m, shared, [&](Rank rank) {
      atomicMax(&shared.best[place_in_union(column_of(rank), shared)],
                static_cast<std::uint32_t>(rank >> kColumnBits));
    });
  }
  __syncthreads();
  // Places are in the order of columns, so that they stand for them in a rank.
  const auto rank_at = [&](int place) { return rank_of(shared.best[place], place); };
  if (threadIdx.x < 32) {
    const Rank threshold = limit > 0 ? kth_greatest_of(rank_at, total, limit) : ~Rank{0};
    if (threadIdx.x == 0) shared.limit_threshold = threshold;
  }
  __syncthreads();
  const Words words = own_words(head.columns);
  for (int w = words.first; w < words.end; ++w) {
    int place = shared.before[w];
    for (std::uint32_t bits = shared.wanted[w]; bits != 0; bits &= bits - 1, ++place) {
      if (rank_at(place) < shared.limit_threshold) shared.wanted[w] &= ~(bits & (~bits + 1));
    }
  }
}

// The same of a union whose ranks don't fit shared memory.
__device__ __noinline__ void truncate_large(const Head& head, int limit, Shared& shared) {
  const UnionRanks ranks{head, shared};
  const Rank threshold = limit > 0 ? kth_greatest(ranks, limit, shared) : ~Rank{0};
  __syncthreads();
  // Words are read and cleared by the same thread.
  ranks.for_each([&](Rank rank) {
    const int column = column_of(rank);
    if (rank < threshold) shared.wanted[column / 32] &= ~(1U << (column % 32));
  });
}

__device__ void choose_head(const Head& head, int kv_head_index, const Selection& selection,
                            Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int w = static_cast<int>(threadIdx.x); w < (head.columns + 31) / 32; w += kThreads) {
    shared.wanted[w] = 0;
  }
  for (int m = static_cast<int>(threadIdx.x); m < head.maps(); m += kThreads) {
    begin_map(head, m, shared);
  }
  __syncthreads();
  list_candidates(head, shared);
  __syncthreads();
  for (int m = warp; m < head.maps(); m += kWarps) {
    if (shared.maps[m].is_listed) choose_in_list(head, m, shared);
  }
  __syncthreads();
  for (int m = 0; m < head.maps(); ++m) {
    const MapChoice& choice = shared.maps[m];
    if (choice.usable && !choice.is_listed) choose_among_all(head, m, shared);
  }
  __syncthreads();
  for (int m = 0; m < head.maps(); ++m) {
    for_each_wanted(head, m, shared, [&](Rank rank) {
      const int column = column_of(rank);
      atomicOr(&shared.wanted[column / 32], 1U << (column % 32));
    });
  }
  __syncthreads();
  const int limit = min(head.state.max_per_head, selection.max_selected);
  int total = count_union(head.columns, shared);
  if (total > limit) {
    if (total <= kMaxUnion) {
      truncate(head, total, limit, shared);
    } else {
      truncate_large(head, limit, shared);
    }
    __syncthreads();
    total = count_union(head.columns, shared);
  }
  std::int32_t* out =
      selection.blocks + static_cast<std::ptrdiff_t>(kv_head_index) * selection.max_selected;
  const Words words = own_words(head.columns);
  for (int w = words.first; w < words.end; ++w) {
    int at = shared.before[w];
    for (std::uint32_t bits = shared.wanted[w]; bits != 0; bits &= bits - 1) {
      out[at++] = w * 32 + __ffs(static_cast<int>(bits)) - 1 + kSinkColumns;
    }
  }
  if (threadIdx.x == 0) selection.counts[kv_head_index] = total;
}

// The maps' sums are those of the newest row now.
__device__ void mark_current(const Head& head) {
  if (head.columns <= head.state.top_k) return;
  for (int m = static_cast<int>(threadIdx.x); m < head.maps(); m += kThreads) {
    const Map map = head.map(m);
    map.header().num_rows = map.num_rows();
    map.header().columns = head.columns;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    choose_kernel(const PredictArgs args, std::uint32_t* counters, int num_counters) {
  __shared__ Shared shared;
  for (int i = static_cast<int>(threadIdx.x); i < args.rows; i += kThreads) {
    shared.first_item[i] = args.states[i].num_layers * args.states[i].num_kv_heads;
  }
  sum_up(args.rows, shared.first_item);
  wait_for_earlier_kernels();
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < num_counters; i += kThreads) counters[i] = 0;
  }
  int sequence = 0;
  const int total = shared.first_item[args.rows];
  for (int item = static_cast<int>(blockIdx.x); item < total; item += static_cast<int>(gridDim.x)) {
    while (shared.first_item[sequence + 1] <= item) ++sequence;
    const HistoryState& state = args.states[sequence];
    const int kv_head = item - shared.first_item[sequence];  // of all layers
    const int first_map = kv_head * state.maps_per_kv_head;
    const Head head{state, first_map, Map{state, first_map}.candidates()};
    choose_head(head, kv_head, args.selections[sequence], shared);
    mark_current(head);
    __syncthreads();
  }
}

}  // namespace

void choose_blocks(const PredictArgs& args, int num_counters, CudaStream& stream) {
  static const auto grid = static_cast<unsigned>(2 * num_sms());
  launch_overlapped(choose_kernel, grid, kThreads, 0, stream, args, stream.counters(),
                    num_counters);
}

}  // namespace foretoken::kernels::cuda
