// Choices without the CNN: the oracle's and the sliding window's, block for block those of
// kernels/cpu/select.cc where scores are equal to the bit. A CTA a (row, KV head): the k-th best
// score is found bit by bit, by counting; ties go to the lower column.
#include <cfloat>
#include <climits>
#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/kept_blocks.h"
#include "kernels/trace_choice.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kHeadCtas = 8;           // of a row; more KV heads take turns
constexpr std::uint32_t kNoScore = 0;  // below the bits of every number

// Rises with the value; kNoScore for NaN: a column that isn't wanted.
__device__ std::uint32_t rising_bits(float score) {
  if (isnan(score)) return kNoScore;
  const std::uint32_t bits = __float_as_uint(score + 0.0F);  // -0 is 0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}

// Kept are the scores above these bits, and the first `ties` of those that have them.
struct Threshold {
  std::uint32_t bits;
  int ties;
};

struct SharedMemory {
  Reducer<kThreads, 1>::Memory reducer;
  int warp_totals[32];
};

// The choice of one KV head among its candidates, the columns from kSinkBlocks on. Each thread
// keeps to the columns that are its own, so `scores` and `best` need no barriers.
class HeadChoice {
 public:
  // scores, best: [num_candidates] scratch.
  __device__ HeadChoice(int num_candidates, float* scores, float* best, SharedMemory& shared)
      : count_(num_candidates), scores_(scores), best_(best), shared_(shared) {
    for_own([this](int c) { best_[c] = NAN; });
  }

  // A map's k best by score(c); the k latest if one is not finite.
  template <typename Score>
  __device__ void add_map(int k, Score score) {
    bool finite = true;
    for_own([&](int c) {
      scores_[c] = score(c);
      finite &= isfinite(scores_[c]);
    });
    if (__syncthreads_and(finite) == 0) {
      for_own([&](int c) {
        if (c >= count_ - k) want(c, -FLT_MAX);
      });
      return;
    }
    const Threshold threshold = find_threshold(scores_, k);
    for_kept(scores_, threshold, [this](int c, bool kept, int) {
      if (kept) want(c, scores_[c]);
    });
  }

  // Writes the union, sorted: at most `limit` blocks. Returns how many.
  __device__ int finish(int limit, std::int32_t* blocks) {
    const Threshold threshold = find_threshold(best_, limit);
    return for_kept(best_, threshold, [=](int c, bool kept, int place) {
      if (kept) blocks[place] = c + kSinkBlocks;
    });
  }

 private:
  template <typename F>
  __device__ void for_own(F f) const {
    for (int c = threadIdx.x; c < count_; c += kThreads) f(c);
  }
  __device__ void want(int c, float score) const {
    best_[c] = isnan(best_[c]) ? score : fmaxf(best_[c], score);
  }

  __device__ int count_from(const float* scores, std::uint32_t bits) {
    int count = 0;
    for_own([&](int c) { count += rising_bits(scores[c]) >= bits ? 1 : 0; });
    Reducer<kThreads, 1> reducer(shared_.reducer);
    return reducer.over_cta(count, [](int a, int b) { return a + b; });
  }
  __device__ Threshold find_threshold(const float* scores, int k) {
    if (count_from(scores, kNoScore + 1) <= k) return {kNoScore, 0};
    std::uint32_t bits = 0;  // the highest that k scores reach
    for (std::uint32_t bit = 1U << 31; bit != 0; bit >>= 1) {
      if (count_from(scores, bits | bit) >= k) bits |= bit;
    }
    return {bits, k - count_from(scores, bits + 1)};
  }

  // Calls f(c, kept, place among the kept) for every candidate, and returns how many are kept.
  template <typename F>
  __device__ int for_kept(const float* scores, Threshold threshold, F f) {
    int num_ties = 0;
    int num_kept = 0;
    for (int first = 0; first < count_; first += kThreads) {
      const int c = first + static_cast<int>(threadIdx.x);
      const std::uint32_t bits = c < count_ ? rising_bits(scores[c]) : kNoScore;
      const bool tie = bits != kNoScore && bits == threshold.bits;
      int total = 0;
      const int tie_end =
          num_ties + inclusive_sum<kThreads>(tie ? 1 : 0, shared_.warp_totals, &total);
      num_ties += total;
      __syncthreads();  // warp_totals is written again
      const bool kept = bits > threshold.bits || (tie && tie_end <= threshold.ties);
      const int end = num_kept + inclusive_sum<kThreads>(kept ? 1 : 0, shared_.warp_totals, &total);
      num_kept += total;
      __syncthreads();  // ... and again
      if (c < count_) f(c, kept, end - 1);
    }
    return num_kept;
  }

  int count_;
  float* scores_;
  float* best_;
  SharedMemory& shared_;
};

// mean over the map's query heads of exp(block_max - lse), in the CPU's order of sums.
__device__ float exact_value(const SelectTopArgs& args, int row, int first_head, int num_heads,
                             int candidate) {
  const float share = 1.0F / static_cast<float>(num_heads);
  float value = 0;
  for (int head = first_head; head < first_head + num_heads; ++head) {
    const std::size_t at = static_cast<std::size_t>(row) * args.num_heads + head;
    const float logit = args.block_max[at * args.pitch + kSinkBlocks + candidate] - args.lse[at];
    value = __fadd_rn(value, __fmul_rn(share, expf(logit)));
  }
  return value;
}

// scratch: [rows, num_heads, 2, pitch], of which each KV head takes one [2, pitch].
__global__ void __launch_bounds__(kThreads) select_top_kernel(SelectTopArgs args, float* scratch) {
  __shared__ SharedMemory shared;
  const int row = static_cast<int>(blockIdx.y);
  const SequenceKv& kv = args.sequences[row];
  const Selection selection = args.selections[row];
  const int kv_heads = kv.shape.num_kv_heads;
  const int num_candidates = max(0, first_local_block(*kv.length) - kSinkBlocks);
  const int heads_per_map = args.num_heads / (kv_heads * args.maps_per_kv_head);
  require(heads_per_map * kv_heads * args.maps_per_kv_head == args.num_heads);
  require(num_candidates == 0 || num_candidates + kSinkBlocks <= args.pitch);
  for (int kv_head = blockIdx.x; kv_head < kv_heads; kv_head += kHeadCtas) {
    float* scores =
        scratch + (static_cast<std::size_t>(row) * args.num_heads + kv_head) * 2 * args.pitch;
    HeadChoice choice(num_candidates, scores, scores + args.pitch, shared);
    for (int m = 0; m < args.maps_per_kv_head; ++m) {
      const int first_head = (kv_head * args.maps_per_kv_head + m) * heads_per_map;
      choice.add_map(args.top_k,
                     [&](int c) { return exact_value(args, row, first_head, heads_per_map, c); });
    }
    const std::size_t index = head_index(kv, args.layer, kv_head);
    const int count =
        choice.finish(selection.max_selected, selection.blocks + index * selection.max_selected);
    if (threadIdx.x == 0) selection.counts[index] = count;
  }
}

__global__ void __launch_bounds__(kThreads) select_recent_kernel(SelectRecentArgs args) {
  const SequenceKv& kv = args.sequences[blockIdx.y];
  const Selection selection = args.selections[blockIdx.y];
  require(args.count <= selection.max_selected);
  const int end = first_local_block(*kv.length);
  const int count = max(0, min(args.count, end - kSinkBlocks));
  const int heads = kv.shape.num_layers * kv.shape.num_kv_heads;
  for (int head = blockIdx.x; head < heads; head += static_cast<int>(gridDim.x)) {
    std::int32_t* blocks =
        selection.blocks + static_cast<std::size_t>(head) * selection.max_selected;
    for (int i = threadIdx.x; i < count; i += kThreads) blocks[i] = end - count + i;
    if (threadIdx.x == 0) selection.counts[head] = count;
  }
}

__global__ void __launch_bounds__(kThreads) select_trace_kernel(SelectTraceArgs args) {
  const SequenceKv& kv = args.sequences[blockIdx.y];
  const Selection selection = args.selections[blockIdx.y];
  require(args.count <= selection.max_selected);
  const TraceChoice choice = trace_choice(*kv.length, args.count, args.churn);
  const int heads = kv.shape.num_layers * kv.shape.num_kv_heads;
  for (int head = blockIdx.x; head < heads; head += static_cast<int>(gridDim.x)) {
    std::int32_t* blocks =
        selection.blocks + static_cast<std::size_t>(head) * selection.max_selected;
    for (int i = threadIdx.x; i < choice.count; i += kThreads) blocks[i] = choice.block(head, i);
    if (threadIdx.x == 0) selection.counts[head] = choice.count;
  }
}

}  // namespace

void select_top(const SelectTopArgs& args, CudaStream& stream) {
  FT_CHECK(args.top_k >= 1 && args.maps_per_kv_head >= 1, args.top_k, args.maps_per_kv_head);
  if (args.rows == 0) return;
  const std::size_t floats = static_cast<std::size_t>(args.rows) * args.num_heads * 2 * args.pitch;
  auto* scratch = reinterpret_cast<float*>(stream.scratch(floats * sizeof(float)));
  const dim3 ctas(kHeadCtas, static_cast<unsigned>(args.rows));
  select_top_kernel<<<ctas, kThreads, 0, stream.handle()>>>(args, scratch);
  FT_CUDA(cudaGetLastError());
}

void select_recent(const SelectRecentArgs& args, CudaStream& stream) {
  FT_CHECK(args.count >= 0, args.count);
  if (args.rows == 0) return;
  const dim3 ctas(4 * kHeadCtas, static_cast<unsigned>(args.rows));
  select_recent_kernel<<<ctas, kThreads, 0, stream.handle()>>>(args);
  FT_CUDA(cudaGetLastError());
}

void select_trace(const SelectTraceArgs& args, CudaStream& stream) {
  FT_CHECK(args.count >= 0 && args.churn >= 0 && args.churn <= 1, args.count, args.churn);
  if (args.rows == 0) return;
  const dim3 ctas(4 * kHeadCtas, static_cast<unsigned>(args.rows));
  select_trace_kernel<<<ctas, kThreads, 0, stream.handle()>>>(args);
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels::cuda
