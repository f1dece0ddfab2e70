// Top-k of a map's scores, and the union over the maps of a KV head: one CTA a KV head.
//
// A candidate's rank is a 56-bit number, unique within a map: its score as an unsigned integer,
// then its column, the lower the better. Maps may be taken together: of a union of which no more
// are wanted than of each map, the best of all maps are the best by their greatest rank. (Who is
// not among the k best of the map that ranks it highest has k better ones there.)
//   list        the candidates that reach a bound, in one pass over all scores. The bound is what
//               nearly twice top_k reached a step ago (MapHeader::bound), and scores move slowly.
//   threshold   which exactly top_k reach: by search in the list, all lists at once. Where there is
//               no such list (a first step, scores that jumped, a top_k too large for it), by radix
//               selection among all candidates, a list after the other.
//   union       a bit a candidate; of too many the best, by the best of the maps that want it.
// Loops of a turn or two are not unrolled: code that runs once a step comes from device memory.
#include "kernels/cuda/best_blocks.h"
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

// Of a score: in its order, and never kLatest (cnn_tables.h bounds s).
__device__ std::uint32_t score_bits(std::int32_t score) {
  return static_cast<std::uint32_t>(score) ^ 0x80000000U;
}

// The maps of one KV head, and its lists: one of each map, or one of all.
struct Head {
  std::byte* first_map;
  std::size_t map_bytes;
  std::size_t scores_offset;
  std::int64_t num_rows;
  std::uint32_t* fallbacks;
  int maps;
  int lists;
  int maps_of_list;
  int room;     // of a list
  int columns;  // candidates
  int top_k;
  int max_chosen;

  Head() = default;
  // kv_head: of all layers'.
  __device__ Head(const HistoryState& state, int kv_head, const Selection& selection)
      : map_bytes(cuda::map_bytes(state.max_columns)),
        scores_offset(cuda::scores_offset(state.max_columns)),
        fallbacks(state.fallbacks),
        maps(state.maps_per_kv_head),
        top_k(state.top_k),
        max_chosen(min(state.max_per_head, selection.max_selected)) {
    const Map map{state, kv_head * maps};
    first_map = map.bytes();
    // Past L1, as all that is read before the wait: what L1 has may be of before.
    num_rows = __ldcg(&state.num_rows[map.layer()]);
    columns = num_candidates(__ldcg(&state.num_columns[map.layer()]));
    divide(max_chosen <= top_k ? 1 : maps);
  }
  __device__ void divide(int into) {
    lists = into;
    maps_of_list = maps / into;
    room = kListed / into;
  }
  // How many a list's maps want.
  __device__ int wanted() const { return lists == 1 ? max(1, min(top_k, max_chosen)) : top_k; }
  // Of one of them, the greatest over the maps.
  __device__ std::int32_t score(int list, int column) const {
    std::int32_t most = scores(list * maps_of_list)[column];
    for (int m = 1; m < maps_of_list; ++m) {
      most = max(most, scores(list * maps_of_list + m)[column]);
    }
    return most;
  }
  __device__ bool is_scored() const { return columns > top_k; }
  __device__ MapHeader& header(int m) const {
    return *reinterpret_cast<MapHeader*>(first_map + static_cast<std::size_t>(m) * map_bytes);
  }
  __device__ const std::int32_t* scores(int m) const {
    return reinterpret_cast<const std::int32_t*>(
        first_map + static_cast<std::size_t>(m) * map_bytes + scores_offset);
  }
};

// What a list's maps want.
struct ListChoice {
  bool usable;          // else it wants its latest candidates
  bool is_listed;       // all that it wants is in its list
  std::uint32_t bound;  // on the score; 0 lists all
  std::uint32_t gap;    // from there to the last step's threshold
  Rank threshold;       // it wants the ranks from here on
};

struct Shared {
  Head head;
  int first_item[kMaxPredictSequences + 1];
  alignas(16) std::uint32_t wanted[kMaskWords];  // a bit a candidate: the union
  std::uint16_t before[kMaskWords];              // bits in the words before
  std::uint32_t best[kMaxUnion];                 // scores of the union's candidates
  Rank listed[kListed];                          // [lists, kListed / lists]
  ListChoice lists[kMaxMaps];
  int count[kMaxMaps];   // of the candidates that reach a list's bound, in it or not
  int reach[2][kWarps];  // ranks that reach each warp's pivot, in turns
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

// The ranks of one list's maps. The first columns' stay in registers.
class ListRanks {
 public:
  __device__ ListRanks(const Head& head, int list) : head_(head), list_(list) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = i * kThreads + static_cast<int>(threadIdx.x);
      held_[i] = column < head.columns ? score_bits(head.score(list, column)) : 0;
    }
  }
  template <typename F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = i * kThreads + static_cast<int>(threadIdx.x);
      if (column < head_.columns) f(rank_of(held_[i], column));
    }
    for (int column = kHeld * kThreads + static_cast<int>(threadIdx.x); column < head_.columns;
         column += kThreads) {
      f(rank_of(score_bits(head_.score(list_, column)), column));
    }
  }

 private:
  const Head& head_;
  int list_;
  std::uint32_t held_[kHeld];
};

// The ranks of the union: of a column, the best of the lists that want it.
struct UnionRanks {
  const Shared& shared;

  template <typename F>
  __device__ void for_each(const F& f) const {
    const int words = (shared.head.columns + 31) / 32;
    for (int word = static_cast<int>(threadIdx.x); word < words; word += kThreads) {
      for (std::uint32_t bits = shared.wanted[word]; bits != 0; bits &= bits - 1) {
        f(best(word * 32 + __ffs(static_cast<int>(bits)) - 1));
      }
    }
  }
  __device__ Rank best(int column) const {
    Rank most = rank_of(kLatest, column);
    for (int l = 0; l < shared.head.lists; ++l) {
      if (!shared.lists[l].usable) continue;
      const Rank rank = rank_of(score_bits(shared.head.score(l, column)), column);
      if (rank >= shared.lists[l].threshold) most = max(most, rank);
    }
    return most;
  }
};

// ---- lists -----------------------------------------------------------------------------------

__device__ Rank* list_of(int list, Shared& shared) {
  return shared.listed + list * shared.head.room;
}

// Notes what earlier steps have left of the lists, before they are filled. Its barrier is the
// caller's.
__device__ void begin_lists(Shared& shared) {
  const Head& head = shared.head;
  const int list = static_cast<int>(threadIdx.x);
  if (list >= head.lists) return;
  const MapHeader& header = head.header(list * head.maps_of_list);
  const std::uint32_t bound = __ldcg(&header.bound);
  const bool known = bound != 0 || head.columns <= head.room;
  shared.count[list] = 0;
  shared.lists[list] = {.usable = head.is_scored(),
                        .is_listed = head.is_scored() && known && head.wanted() <= head.room,
                        .bound = bound,
                        .gap = __ldcg(&header.gap),
                        .threshold = 0};
}

// Lists what reaches the bounds of those that have one.
__device__ void list_candidates(Shared& shared) {
  const Head& head = shared.head;
  const int columns = head.columns;
  const int fours = (columns + 3) / 4;
  for (int l = 0; l < head.lists; ++l) {
    if (!shared.lists[l].is_listed) continue;
    const std::uint32_t bound = shared.lists[l].bound;
    // All loads of a batch are under way before the first is looked at.
    constexpr int kBatch = 4;
    for (int first = static_cast<int>(threadIdx.x); first < fours; first += kBatch * kThreads) {
      const auto load = [&](int m, int b) {
        const auto* scores = reinterpret_cast<const int4*>(head.scores(l * head.maps_of_list + m));
        return scores[min(first + b * kThreads, fours - 1)];
      };
      int4 of[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) of[b] = load(0, b);
#pragma unroll 1
      for (int m = 1; m < head.maps_of_list; ++m) {
        int4 more[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) more[b] = load(m, b);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          of[b] = {max(of[b].x, more[b].x), max(of[b].y, more[b].y), max(of[b].z, more[b].z),
                   max(of[b].w, more[b].w)};
        }
      }
      // A bit each: few reach the bound.
      unsigned reach = 0;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const std::int32_t four[] = {of[b].x, of[b].y, of[b].z, of[b].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) reach |= score_bits(four[i]) >= bound ? 1U << (4 * b + i) : 0U;
      }
      for (; reach != 0; reach &= reach - 1) {
        const int bit = __ffs(static_cast<int>(reach)) - 1;
        const int column = (first + bit / 4 * kThreads) * 4 + bit % 4;
        if (column >= columns) break;
        const int at = atomicAdd(&shared.count[l], 1);
        if (at >= head.room) continue;
        list_of(l, shared)[at] = rank_of(score_bits(head.score(l, column)), column);
      }
    }
  }
}

// A number that exactly k of `count` different ranks reach, rank_at(i): found by `team` warps, each
// of which tries a pivot a round. All ranks reach `low`; the first round's pivots are `step` apart.
// All threads of the CTA call it, for a list each team; a team without one has count = k = 0.
// REQUIRES: count >= k.
template <typename RankAt>
__device__ Rank kth_greatest_of(const RankAt& rank_at, int count, int k, Rank low, Rank step,
                                int team, Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int pivot = warp % team;     // this warp's; the greatest is the last one's
  Rank high = Rank{1} << kRankBits;  // fewer than k reach it; at least k reach low
  const int shift = 31 - __clz(team + 1);
  bool found = count == k;
  for (int round = 0;; round ^= 1) {
    if (!found) {
      const Rank tried = low + step * static_cast<unsigned>(pivot + 1);
      int reach = 0;
#pragma unroll 4
      for (int i = lane_id(); i < count; i += 32) reach += rank_at(i) >= tried ? 1 : 0;
      reach = __reduce_add_sync(~0U, reach);
      if (lane_id() == 0) shared.reach[round][warp] = reach;
    }
    if (__syncthreads_or(found ? 0 : 1) == 0) return low;
    if (found) continue;
    const bool is_pivot = lane_id() < team;
    const int reach = is_pivot ? shared.reach[round][warp - pivot + lane_id()] : 0;
    const int enough = __popc(__ballot_sync(~0U, is_pivot && reach >= k));  // the first ones
    found = __any_sync(~0U, is_pivot && reach == k);
    if (enough < team) high = min(high, low + step * static_cast<unsigned>(enough + 1));
    low += step * static_cast<unsigned>(enough);
    step = max(Rank{1}, (high - low) >> shift);
  }
}

// The first round's steps: half of a team's pivots stand no more than `far`, a difference of
// scores, above the lowest rank, and half beyond.
__device__ Rank first_step(Rank far, int team) {
  return max(Rank{1}, 2 * (far << kColumnBits) / static_cast<unsigned>(team));
}

// Of a list: sets what the next step's list starts at. That is as far below the threshold as
// this one's, half or twice as far where that lists too much or too little.
__device__ void set_next_bound(const ListChoice& choice, int count, int k, int room,
                               MapHeader& header) {
  const auto score = static_cast<std::uint32_t>(choice.threshold >> kColumnBits);
  std::uint32_t gap = score - choice.bound;
  if (count > min(2 * k, room - room / 8)) gap /= 2;
  if (count < k + k / 4) gap = min(gap, 1U << 30) * 2 + 1;
  gap = min(gap, score);
  header.bound = score - gap;
  header.gap = gap;
}

// Of the lists: whether one holds enough, the threshold, the next bound.
__device__ void choose_in_lists(Shared& shared) {
  const Head& head = shared.head;
  const int k = head.wanted();
  const int team = max(1, kWarps / head.lists);  // warps of a list
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int first = 0; first < head.lists; first += kWarps / team) {
    const int l = first + warp / team;
    const bool is_listed = l < head.lists && shared.lists[l].is_listed;
    ListChoice& choice = shared.lists[is_listed ? l : 0];
    const int count = is_listed ? shared.count[l] : 0;
    const bool fits = is_listed && choice.usable && count >= k && count <= head.room;
    const Rank* list = list_of(is_listed ? l : 0, shared);
    const Rank low = Rank{choice.bound} << kColumnBits;
    const Rank step = first_step(choice.gap, team);
    const Rank threshold = kth_greatest_of([&](int i) { return list[i]; }, fits ? count : 0,
                                           fits ? k : 0, low, step, team, shared);
    if (!is_listed || warp % team != 0 || lane_id() != 0) continue;
    choice.is_listed = fits;
    choice.threshold = threshold;
    if (fits) set_next_bound(choice, count, k, head.room, head.header(l * head.maps_of_list));
  }
}

// ---- one list --------------------------------------------------------------------------------

// Of one that does not hold enough, by all threads. Rare, so out of the others' way.
__device__ __noinline__ void choose_among_all(int list, Shared& shared) {
  const Head& head = shared.head;
  const ListRanks ranks(head, list);
  const int k = head.wanted();
  const Rank threshold = kth_greatest(ranks, k, shared);
  if (threadIdx.x == 0) shared.lists[list].threshold = threshold;
  const int listed = min(k + k / 2, (k + head.room) / 2);
  if (k >= head.room || listed >= head.columns) return;
  const Rank bound = kth_greatest(ranks, listed, shared);
  if (threadIdx.x == 0) {
    MapHeader& header = head.header(list * head.maps_of_list);
    header.bound = static_cast<std::uint32_t>(bound >> kColumnBits);
    header.gap = static_cast<std::uint32_t>(threshold >> kColumnBits) - header.bound;
  }
}

// Calls f(rank) for those ranks that a list's maps want and that are this thread's.
template <typename F>
__device__ void for_each_wanted(int list, Shared& shared, const F& f) {
  const Head& head = shared.head;
  const ListChoice& choice = shared.lists[list];
  const int tid = static_cast<int>(threadIdx.x);
  if (!choice.usable) {
    const int first = max(0, head.columns - head.top_k);
#pragma unroll 1
    for (int c = first + tid; c < head.columns; c += kThreads) f(rank_of(kLatest, c));
  } else if (choice.is_listed) {
    const Rank* listed = list_of(list, shared);
#pragma unroll 1
    for (int i = tid; i < shared.count[list]; i += kThreads) {
      if (listed[i] >= choice.threshold) f(listed[i]);
    }
  } else {
#pragma unroll 1
    for (int c = tid; c < head.columns; c += kThreads) {
      const Rank rank = rank_of(score_bits(head.score(list, c)), c);
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
#pragma unroll 1
  for (int w = words.first; w < words.end; ++w) count += __popc(shared.wanted[w]);
  return count;
}

// Counts the union; shared.before is right after it.
__device__ int count_union(int columns, Shared& shared) {
  int total = 0;
  int before = sum_before(count_wanted(columns, shared), shared, &total);
  const Words words = own_words(columns);
#pragma unroll 1
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

// Leaves the max_chosen best of the union. REQUIRES: there are more.
__device__ void truncate(int total, Shared& shared) {
  const Head& head = shared.head;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kThreads) shared.best[i] = 0;
  __syncthreads();
  Rank low = ~Rank{0};
  for (int l = 0; l < head.lists; ++l) {
    low = min(low, shared.lists[l].usable ? shared.lists[l].threshold : Rank{0});
    for_each_wanted(l, shared, [&](Rank rank) {
      atomicMax(&shared.best[place_in_union(column_of(rank), shared)],
                static_cast<std::uint32_t>(rank >> kColumnBits));
    });
  }
  __syncthreads();
  // Places are in the order of columns, so that they stand for them in a rank.
  const auto rank_at = [&](int place) { return rank_of(shared.best[place], place); };
  low = low >> kColumnBits << kColumnBits;
  const Rank step = first_step(2 * Rank{shared.lists[0].gap}, kWarps);  // a guess
  const Rank threshold = head.max_chosen > 0 ? kth_greatest_of(rank_at, total, head.max_chosen, low,
                                                               step, kWarps, shared)
                                             : ~Rank{0};
  const Words words = own_words(head.columns);
#pragma unroll 1
  for (int w = words.first; w < words.end; ++w) {
    int place = shared.before[w];
    for (std::uint32_t bits = shared.wanted[w]; bits != 0; bits &= bits - 1, ++place) {
      if (rank_at(place) < threshold) shared.wanted[w] &= ~(bits & (~bits + 1));
    }
  }
}

// The same of a union whose ranks don't fit shared memory.
__device__ __noinline__ void truncate_large(Shared& shared) {
  const UnionRanks ranks{shared};
  const int limit = shared.head.max_chosen;
  const Rank threshold = limit > 0 ? kth_greatest(ranks, limit, shared) : ~Rank{0};
  __syncthreads();
  // Words are read and cleared by the same thread.
  ranks.for_each([&](Rank rank) {
    const int column = column_of(rank);
    if (rank < threshold) shared.wanted[column / 32] &= ~(1U << (column % 32));
  });
}

// ---- the choice ------------------------------------------------------------------------------

// Before a KV head's turn.
__device__ void begin_head(const HistoryState& state, int kv_head, const Selection& selection,
                           Shared& shared) {
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) shared.head = Head(state, kv_head, selection);
  for (int w = tid; w < kMaskWords / 4; w += kThreads) {
    reinterpret_cast<uint4*>(shared.wanted)[w] = {};
  }
  __syncthreads();
  begin_lists(shared);
  __syncthreads();
}

// Fills the lists. Maps of which one is not clean, and wants its latest candidates, are listed one
// by one.
__device__ void fill_lists(Shared& shared) {
  Head& head = shared.head;
  const int tid = static_cast<int>(threadIdx.x);
  const std::int64_t clean_from = tid < head.maps ? head.header(tid).clean_from : 0;
  list_candidates(shared);
  const bool distrusted = tid < head.maps && head.is_scored() && head.num_rows < clean_from;
  if (distrusted) atomicAdd(head.fallbacks, 1U);
  if (__syncthreads_or(distrusted ? 1 : 0) == 0) return;
  if (head.lists < head.maps) {
    __syncthreads();
    if (tid == 0) head.divide(head.maps);
    __syncthreads();
    begin_lists(shared);
    __syncthreads();
    list_candidates(shared);
  }
  if (distrusted) shared.lists[tid].usable = false;
  __syncthreads();
}

// blocks, count: where the choice of shared.head goes, whose sums are then marked as those of the
// newest row.
__device__ void choose_head(std::int32_t* blocks, std::int32_t* count, Shared& shared) {
  const Head& head = shared.head;
  const int tid = static_cast<int>(threadIdx.x);
  fill_lists(shared);
  choose_in_lists(shared);
  __syncthreads();
  for (int l = 0; l < head.lists; ++l) {
    if (shared.lists[l].usable && !shared.lists[l].is_listed) choose_among_all(l, shared);
  }
  __syncthreads();
  for (int l = 0; l < head.lists; ++l) {
    for_each_wanted(l, shared, [&](Rank rank) {
      const int column = column_of(rank);
      atomicOr(&shared.wanted[column / 32], 1U << (column % 32));
    });
  }
  __syncthreads();
  int total = count_union(head.columns, shared);
  if (total > head.max_chosen) {
    if (total <= kMaxUnion) {
      truncate(total, shared);
    } else {
      truncate_large(shared);
    }
    __syncthreads();
    total = count_union(head.columns, shared);
  }
  const Words words = own_words(head.columns);
#pragma unroll 1
  for (int w = words.first; w < words.end; ++w) {
    int at = shared.before[w];
    for (std::uint32_t bits = shared.wanted[w]; bits != 0; bits &= bits - 1) {
      blocks[at++] = w * 32 + __ffs(static_cast<int>(bits)) - 1 + kSinkColumns;
    }
  }
  if (tid == 0) *count = total;
  if (!head.is_scored()) return;
  for (int m = tid; m < head.maps; m += kThreads) {
    MapHeader& header = head.header(m);
    header.num_rows = head.num_rows;
    header.columns = head.columns;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    choose_kernel(const PredictArgs args, std::uint32_t* counters, int num_counters) {
  __shared__ Shared shared;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < args.rows; i += kThreads) {
    shared.first_item[i] = args.states[i].num_layers * args.states[i].num_kv_heads;
  }
  sum_up(args.rows, shared.first_item);
  int sequence = 0;
  const int total = shared.first_item[args.rows];
  for (int item = static_cast<int>(blockIdx.x); item < total; item += static_cast<int>(gridDim.x)) {
    while (shared.first_item[sequence + 1] <= item) ++sequence;
    const int kv_head = item - shared.first_item[sequence];  // of all layers
    const Selection& selection = args.selections[sequence];
    // Rows and columns were counted before the slide kernel let others begin; the rest is of the
    // step before.
    begin_head(args.states[sequence], kv_head, selection, shared);
    wait_for_earlier_kernels();
    choose_head(selection.blocks + static_cast<std::ptrdiff_t>(kv_head) * selection.max_selected,
                selection.counts + kv_head, shared);
    __syncthreads();
  }
  wait_for_earlier_kernels();
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < num_counters; i += kThreads) counters[i] = 0;
  }
}

}  // namespace

void choose_blocks(const PredictArgs& args, int num_counters, CudaStream& stream) {
  static const auto grid = static_cast<unsigned>(2 * num_sms());
  launch_overlapped(choose_kernel, grid, kThreads, 0, stream, args, stream.counters(),
                    num_counters);
}

}  // namespace foretoken::kernels::cuda
