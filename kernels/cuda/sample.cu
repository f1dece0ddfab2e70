// Sampling, with the results of kernels/cpu/sample.cc. A cluster of CTAs a row, each with its
// slice of the vocabulary; a greedy row reads its logits twice, the second time from the caches.
//
// Weights are exp(logit - highest) as integers, so that their sums are exact in any order: every
// rank draws the same token. What top-k, min-p and top-p leave is a beginning of the vocabulary in
// the order (logit down, token up), so no sort is needed: each filter, and the draw, asks for the
// token at which a running count or weight passes a value, and a radix search finds it.
#include <climits>
#include <cmath>
#include <cstdint>

#include "common/check.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/philox.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kCtas = 8;                  // of a cluster: as many as every device of 9.0 can place
constexpr double kWeightOne = 0x1p45;     // the highest logit's weight:
constexpr int kMaxVocab = 1 << 19;        // ... so that the sum of all stays below 2^64
constexpr int kBuckets = 1024;            // first digit of the search: logits by distance from the
constexpr float kBucketsPerUnit = 32.0F;  // highest; the last bucket holds all that are 32 below
constexpr int kDigits = 2048;             // of the further ones: 11, 11 and 10 bits of the float

using Weight64 = unsigned long long;

// Counts and weights of tokens, a bin for each value of a digit.
template <int kBins>
struct Histogram {
  Weight64 weights[kBins];
  unsigned counts[kBins];
};

// A bin of a histogram and what lies in better ones.
struct Bin {
  int index;
  unsigned count_before;
  unsigned count;
  Weight64 weight_before;
  Weight64 weight;
};

struct Candidate {
  float logit;
  int token;
};
__device__ bool better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}
__device__ Candidate best(const Candidate& a, const Candidate& b) { return better(a, b) ? a : b; }

struct SharedMemory {
  Histogram<kBuckets> buckets;
  Histogram<kDigits> digits;
  Reducer<kThreads, kCtas>::Memory reducer;
  Weight64 warp_weights[32];
  unsigned warp_counts[32];
  Bin found;
  int token;                                 // of rank 0: the drawn one
  Candidate best[kMaxLogprobs];              // of this CTA's slice
  Candidate all_best[kCtas * kMaxLogprobs];  // of rank 0
};

// Ascends as values fall. REQUIRES: not NaN.
__device__ std::uint32_t falling_bits(float value) {
  const std::uint32_t bits = __float_as_uint(value + 0.0F);  // -0 is 0
  return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000U);
}

// ---- a row's logits
// ------------------------------------------------------------------------------

constexpr std::uint32_t kInPrompt = 0x80000000U;  // beside the count of a token in the output

// The logits of this cluster's row, as penalties and temperature leave them.
class Row {
 public:
  __device__ Row(const SampleRow& row, const float* logits, int vocab, std::uint32_t* token_counts)
      : row_(row), logits_(logits), counts_(has_penalty(row) ? token_counts : nullptr) {
    const int warps = kCtas * kWarps;
    const int share = ((vocab + warps - 1) / warps + 31) / 32 * 32;
    begin_ = min(vocab, share * (cluster_rank() * kWarps + static_cast<int>(threadIdx.x) / 32));
    end_ = min(vocab, begin_ + share);
    if (counts_ != nullptr) count_tokens(vocab);
  }

  // Calls f(token) for the tokens of this warp's slice, which are contiguous, a lane each.
  // kAtOnce loads are in flight.
  template <int kAtOnce = 8, typename F>
  __device__ void for_each(F f) const {
#pragma unroll kAtOnce
    for (int token = begin_ + lane(); token < end_; token += 32) f(token);
  }
  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  __device__ float raw(int token) const { return __ldg(logits_ + token); }
  // Without contraction, as on the CPU.
  __device__ float penalized(int token) const {
    float logit = raw(token);
    const std::uint32_t count = counts_ == nullptr ? 0 : __ldcg(counts_ + token);
    if (count == 0) return logit;
    logit = logit > 0 ? __fdiv_rn(logit, row_.repetition_penalty)
                      : __fmul_rn(logit, row_.repetition_penalty);
    const auto in_output = static_cast<float>(count & ~kInPrompt);
    if (in_output == 0) return logit;
    return __fsub_rn(
        logit, __fadd_rn(row_.presence_penalty, __fmul_rn(row_.frequency_penalty, in_output)));
  }
  __device__ float scaled(int token) const { return __fdiv_rn(penalized(token), row_.temperature); }

 private:
  __device__ static bool has_penalty(const SampleRow& row) {
    return row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0;
  }
  __device__ void count_tokens(int vocab) const {
    for_each([this](int token) { counts_[token] = 0; });
    cluster_sync();
    const int step = kCtas * kThreads;
    for (int i = cluster_rank() * kThreads + static_cast<int>(threadIdx.x); i < row_.num_tokens;
         i += step) {
      const TokenId token = row_.tokens[i];
      if (token < 0 || token >= vocab) continue;
      if (i < row_.num_prompt) {
        atomicOr(counts_ + token, kInPrompt);
      } else {
        atomicAdd(counts_ + token, 1U);
      }
    }
    cluster_sync();
  }

  const SampleRow& row_;
  const float* logits_;
  std::uint32_t* counts_;
  int begin_;
  int end_;
};

// ---- the draw
// ------------------------------------------------------------------------------------

class Sampler {
 public:
  __device__ Sampler(const SampleRow& row, const Row& logits, float highest, int vocab,
                     Reducer<kThreads, kCtas>& reducer, SharedMemory& shared)
      : row_(row),
        logits_(logits),
        highest_(highest),
        vocab_(vocab),
        reducer_(reducer),
        shared_(shared) {}

  // The drawn token; on rank 0 alone. Where temperature or penalties make logits overflow, weights
  // are none, and a search may find nothing: then what stands here is some token, and the same one
  // on every device.
  __device__ int draw() {
    if (threadIdx.x == 0) {
      shared_.found = {};
      shared_.token = 0;
    }
    const float lowest =
        row_.min_p > 0 ? highest_ + static_cast<float>(log(double{row_.min_p})) : -INFINITY;
    if (row_.top_k > 0 || row_.top_p < 1) return draw_best_first(lowest);
    const auto weight = [=, this](int token) { return weight_from(lowest, token); };
    const Sums sums = sum_up(weight);
    return token_at(sums, target_of(sums.total), weight);
  }

 private:
  // Running sums in the order of tokens: of this warp's slice, and before it.
  struct Sums {
    Weight64 before;
    Weight64 own;
    Weight64 total;
  };
  // A place in the order (logit down, token up): the `tie`-th of the tokens with these bits.
  struct Place {
    std::uint32_t bits;
    unsigned tie;
    Weight64 weight_through;  // of all tokens up to this one
  };

  __device__ Weight64 weight_of(float scaled) const {
    return __double2ull_rn(exp(static_cast<double>(scaled - highest_)) * kWeightOne);
  }
  __device__ Weight64 weight_from(float lowest, int token) const {
    const float value = logits_.scaled(token);
    return value >= lowest ? weight_of(value) : 0;
  }
  // Uniform in [0, total).
  __device__ Weight64 target_of(Weight64 total) const {
    const double uniform = philox_uniform(row_.seed, static_cast<std::uint64_t>(row_.position));
    return __umul64hi(static_cast<Weight64>(uniform * 0x1p53) << 11, total);
  }

  __device__ int draw_best_first(float lowest) {
    Weight64 kept = fill_buckets();
    if (row_.top_k > 0 && row_.top_k < vocab_) {
      const auto last = static_cast<Weight64>(row_.top_k - 1);
      kept = find_place</*kByCount=*/true>(last).weight_through;
    }
    if (row_.min_p > 0) {
      const Sums sums = sum_up([=, this](int token) { return weight_from(lowest, token); });
      kept = min(kept, sums.total);
    }
    if (row_.top_p < 1) {
      const double wanted = ceil(static_cast<double>(row_.top_p) * static_cast<double>(kept));
      const Weight64 last = wanted < 1 ? 0 : min(static_cast<Weight64>(wanted), kept) - 1;
      kept = find_place<false>(last).weight_through;
    }
    const Place place = find_place<false>(target_of(kept));
    const auto is_tie = [=, this](int token) -> Weight64 {
      return falling_bits(logits_.scaled(token)) == place.bits ? 1 : 0;
    };
    return token_at(sum_up(is_tie), place.tie, is_tie);
  }

  // ---- in the order of tokens ----

  template <typename Measure>
  __device__ Sums sum_up(Measure measure) {
    Weight64 own = 0;
    logits_.for_each<1>([&](int token) { own += measure(token); });
    for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(~0U, own, offset);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    __syncthreads();  // the sums before have been read
    if (Row::lane() == 0) shared_.warp_weights[warp] = own;
    __syncthreads();
    Sums sums{0, own, 0};
    Weight64 cta = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) sums.before = cta;
      cta += shared_.warp_weights[w];
    }
    Weight64* posted = reducer_.post(cta);
    for (int rank = 0; rank < kCtas; ++rank) {
      if (rank == cluster_rank()) sums.before += sums.total;
      sums.total += *at_rank(posted, rank);
    }
    return sums;
  }

  // The first token whose running sum is above `target`; on rank 0 alone. One warp of the cluster
  // has it in its slice. REQUIRES: target < sums.total.
  template <typename Measure>
  __device__ int token_at(const Sums& sums, Weight64 target, Measure measure) {
    if (sums.before <= target && target < sums.before + sums.own) {
      Weight64 before = sums.before;
      for (int first = logits_.begin(); first < logits_.end() && before <= target; first += 32) {
        const int token = first + Row::lane();
        const Weight64 own = token < logits_.end() ? measure(token) : 0;
        Weight64 through = own;
        for (int offset = 1; offset < 32; offset *= 2) {
          const Weight64 lower = __shfl_up_sync(~0U, through, offset);
          if (Row::lane() >= offset) through += lower;
        }
        through += before;
        if (through - own <= target && target < through) *at_rank(&shared_.token, 0) = token;
        before = __shfl_sync(~0U, through, 31);
      }
    }
    cluster_sync();
    return shared_.token;
  }

  // ---- best first ----

  __device__ int bucket_of(float scaled) const {
    return static_cast<int>(fminf((highest_ - scaled) * kBucketsPerUnit, kBuckets - 1));
  }

  template <int kBins>
  __device__ void clear(Histogram<kBins>& histogram) const {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      histogram.weights[i] = 0;
      histogram.counts[i] = 0;
    }
    __syncthreads();
  }
  template <int kBins>
  __device__ void add(Histogram<kBins>& histogram, int bin, float scaled) const {
    atomicAdd(histogram.counts + bin, 1U);
    const Weight64 weight = weight_of(scaled);
    if (weight != 0) atomicAdd(histogram.weights + bin, weight);
  }
  // Makes every CTA's histogram the sum of all. Each CTA adds up a share of the bins.
  template <int kBins>
  __device__ void merge(Histogram<kBins>& histogram) const {
    cluster_sync();
    const int share = kBins / kCtas;
    for (int i = threadIdx.x; i < share; i += kThreads) {
      const int bin = cluster_rank() * share + i;
      unsigned count = 0;
      Weight64 weight = 0;
      for (int rank = 0; rank < kCtas; ++rank) {
        count += *at_rank(histogram.counts + bin, rank);
        weight += *at_rank(histogram.weights + bin, rank);
      }
      for (int rank = 0; rank < kCtas; ++rank) {
        *at_rank(histogram.counts + bin, rank) = count;
        *at_rank(histogram.weights + bin, rank) = weight;
      }
    }
    cluster_sync();
  }

  // The bin in which the running count or weight passes `target`.
  template <bool kByCount, int kBins>
  __device__ Bin find_bin(const Histogram<kBins>& histogram, Weight64 target) const {
    constexpr int kOwn = kBins / kThreads;
    const int first = static_cast<int>(threadIdx.x) * kOwn;
    Bin bin{};
    for (int i = first; i < first + kOwn; ++i) {
      bin.count += histogram.counts[i];
      bin.weight += histogram.weights[i];
    }
    unsigned all_counts = 0;
    Weight64 all_weights = 0;
    bin.count_before =
        inclusive_sum<kThreads>(bin.count, shared_.warp_counts, &all_counts) - bin.count;
    bin.weight_before =
        inclusive_sum<kThreads>(bin.weight, shared_.warp_weights, &all_weights) - bin.weight;
    for (int i = first; i < first + kOwn; ++i) {
      bin.index = i;
      bin.count = histogram.counts[i];
      bin.weight = histogram.weights[i];
      const Weight64 before = kByCount ? bin.count_before : bin.weight_before;
      const Weight64 own = kByCount ? bin.count : bin.weight;
      if (before <= target && target < before + own) shared_.found = bin;
      bin.count_before += bin.count;
      bin.weight_before += bin.weight;
    }
    __syncthreads();
    const Bin found = shared_.found;
    __syncthreads();  // read by all before the next search writes
    return found;
  }

  // Returns the weight of all tokens.
  __device__ Weight64 fill_buckets() {
    clear(shared_.buckets);
    logits_.for_each<1>([this](int token) {
      const float scaled = logits_.scaled(token);
      add(shared_.buckets, bucket_of(scaled), scaled);
    });
    merge(shared_.buckets);
    Weight64 weight = 0;
    for (int i = threadIdx.x; i < kBuckets; i += kThreads) weight += shared_.buckets.weights[i];
    return reducer_.over_cta(weight, [](Weight64 a, Weight64 b) { return a + b; });
  }

  // The first token, best first, whose running count or weight is above `target`.
  template <bool kByCount>
  __device__ Place find_place(Weight64 target) {
    const Bin bucket = find_bin<kByCount>(shared_.buckets, target);
    unsigned count = bucket.count_before;
    Weight64 weight = bucket.weight_before;
    Bin digit{};
    std::uint32_t prefix = 0;  // of the bits of those that are looked at
    int known = 0;             // how many bits it has
    for (const int bits : {11, 11, 10}) {
      clear(shared_.digits);
      logits_.for_each<1>([&](int token) {
        const float scaled = logits_.scaled(token);
        if (bucket_of(scaled) != bucket.index) return;
        const std::uint32_t all = falling_bits(scaled);
        if (known > 0 && all >> (32 - known) != prefix) return;
        add(shared_.digits, static_cast<int>(all << known >> (32 - bits)), scaled);
      });
      merge(shared_.digits);
      digit = find_bin<kByCount>(shared_.digits, target - (kByCount ? count : weight));
      count += digit.count_before;
      weight += digit.weight_before;
      prefix = prefix << bits | static_cast<std::uint32_t>(digit.index);
      known += bits;
    }
    const Weight64 each = digit.weight / digit.count;  // of equal logits
    const Weight64 tie = kByCount ? target - count : (target - weight) / each;
    return {prefix, static_cast<unsigned>(tie), weight + (tie + 1) * each};
  }

  const SampleRow& row_;
  const Row& logits_;
  const float highest_;
  const int vocab_;
  Reducer<kThreads, kCtas>& reducer_;
  SharedMemory& shared_;
};

// ---- what is reported
// ----------------------------------------------------------------------------

struct Extremes {
  float highest;   // of the raw logits
  Candidate best;  // of the penalized ones
  int finite;
};

__device__ Extremes find_extremes(const Row& logits, Reducer<kThreads, kCtas>& reducer) {
  Extremes own{-INFINITY, {-INFINITY, INT_MAX}, 1};
  logits.for_each([&](int token) {
    const float raw = logits.raw(token);
    own.highest = fmaxf(own.highest, raw);
    own.best = best(own.best, {logits.penalized(token), token});
    own.finite &= isfinite(raw) ? 1 : 0;
  });
  return reducer.over_cluster(own, [](const Extremes& a, const Extremes& b) {
    return Extremes{fmaxf(a.highest, b.highest), best(a.best, b.best), a.finite & b.finite};
  });
}

__device__ float log_sum_exp(const Row& logits, float highest, Reducer<kThreads, kCtas>& reducer) {
  double sum = 0;
  logits.for_each([&](int token) { sum += expf(logits.raw(token) - highest); });
  sum = reducer.over_cluster(sum, [](double a, double b) { return a + b; });
  return static_cast<float>(highest + log(sum));
}

// The `count` best raw logits, best first: those of each slice, then of these.
__device__ void report_best(const Row& logits, int count, float normalizer, SampledToken& out,
                            Reducer<kThreads, kCtas>& reducer, SharedMemory& shared) {
  Candidate last{INFINITY, -1};
  for (int i = 0; i < count; ++i) {
    Candidate own{-INFINITY, INT_MAX};
    logits.for_each([&](int token) {
      const Candidate candidate{logits.raw(token), token};
      if (better(last, candidate)) own = best(own, candidate);
    });
    last = reducer.over_cta(own, best);
    if (threadIdx.x == 0) shared.best[i] = last;
  }
  cluster_sync();
  if (cluster_rank() != 0) return;
  const int mine = threadIdx.x;
  const int all = kCtas * count;
  if (mine < all) shared.all_best[mine] = at_rank(shared.best, mine / count)[mine % count];
  __syncthreads();
  if (mine >= all || shared.all_best[mine].token == INT_MAX) return;
  int rank = 0;
  for (int i = 0; i < all; ++i) rank += better(shared.all_best[i], shared.all_best[mine]) ? 1 : 0;
  if (rank >= count) return;
  out.top_ids[rank] = shared.all_best[mine].token;
  out.top_logprobs[rank] = shared.all_best[mine].logit - normalizer;
}

__device__ void write_token(const SampleRow& row, int token, float logprob, int num_top,
                            SampledToken& out) {
  if (cluster_rank() != 0 || threadIdx.x != 0) return;
  out.token = token;
  out.logprob = logprob;
  out.num_top = num_top;
  out.mismatches = row.mismatches == nullptr ? 0 : *row.mismatches;
  if (row.append) row.tokens[row.num_tokens] = token;
}

__global__ void __cluster_dims__(kCtas, 1, 1) __launch_bounds__(kThreads, 2)
    sample_kernel(SampleArgs args, std::uint32_t* token_counts) {
  __shared__ SharedMemory shared;
  Reducer<kThreads, kCtas> reducer(shared.reducer);
  const std::size_t index = blockIdx.x / kCtas;
  const SampleRow row = args.rows[index];
  SampledToken& out = args.out[index];
  const Row logits(row, args.logits + index * args.vocab, args.vocab,
                   token_counts + index * args.vocab);
  const Extremes extremes = find_extremes(logits, reducer);
  if (extremes.finite == 0) {
    write_token(row, 0, -INFINITY, 0, out);
  } else {
    const float normalizer = log_sum_exp(logits, extremes.highest, reducer);
    int token = extremes.best.token;
    if (row.forced >= 0 && row.forced < args.vocab) {
      token = row.forced;
    } else if (row.temperature > 0) {
      const float highest = __fdiv_rn(extremes.best.logit, row.temperature);
      token = Sampler(row, logits, highest, args.vocab, reducer, shared).draw();
    }
    const int num_top = min(max(row.num_logprobs, 0), min(kMaxLogprobs, args.vocab));
    if (num_top > 0) report_best(logits, num_top, normalizer, out, reducer, shared);
    // On other ranks `token` may be no token: only rank 0 reads its logit.
    if (cluster_rank() == 0) write_token(row, token, logits.raw(token) - normalizer, num_top, out);
  }
  cluster_sync();  // others may still read this CTA's shared memory
}

}  // namespace

void sample(const SampleArgs& args, CudaStream& stream) {
  FT_CHECK(args.vocab > 0 && args.vocab < kMaxVocab, args.vocab);
  if (args.num_rows == 0) return;
  const std::size_t counts = static_cast<std::size_t>(args.num_rows) * args.vocab;
  auto* token_counts = reinterpret_cast<std::uint32_t*>(stream.scratch(counts * 4));
  sample_kernel<<<args.num_rows * kCtas, kThreads, 0, stream.handle()>>>(args, token_counts);
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels::cuda
