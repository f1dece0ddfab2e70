// Sampling, with the results of kernels/cpu/sample.cc. A cluster of CTAs a row, each with its
// slice of the vocabulary. All that a greedy row needs comes of one pass, which keeps its logits in
// registers, and one exchange between the CTAs.
//
// Weights are exp(logit - highest) as integers, so that their sums are exact in any order: every
// rank draws the same token. What top-k, min-p and top-p leave is a beginning of the vocabulary in
// the order (logit down, token up), so no sort is needed: each filter, and the draw, asks for the
// token at which a running count or weight passes a value, and a radix search finds it.
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/model_limits.h"
#include "kernels/philox.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kCtas = 8;               // of a cluster: as many as every device of 9.0 can place
constexpr int kVectors = 8;            // 16-byte loads of a lane at once: a vocabulary of 131,072
constexpr double kWeightOne = 0x1p45;  // the highest logit's weight: see kMaxVocab
constexpr int kBuckets = 1024;         // first digit of the search: logits by distance from the
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

// Of raw logits.
struct alignas(16) Summary {
  float highest;
  int token;   // the first that has it
  double sum;  // of exp(logit - highest); NaN where a logit is no number
};
// Of no logit, or what stands for one: beside any other it weighs nothing. Where it is the highest,
// all are, and the first token is a real one.
constexpr float kLowest = -FLT_MAX;
__device__ Summary nothing() { return {kLowest, INT_MAX, 0}; }

struct SharedMemory {
  alignas(SampleRow) unsigned char row[sizeof(SampleRow)];
  Summary warps[kWarps];
  Exchange<Summary, kCtas>::Memory exchange;
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

// exp(x) to 2^-21 for what counts in a sum: x is in (-16, 0].
__device__ float exp_approx(float x) {
  constexpr float kLog2E = 1.44269504F;
  float result = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * kLog2E));
  return result;
}

__device__ Summary merge(const Summary& a, const Summary& b) {
  const Candidate found = best({a.highest, a.token}, {b.highest, b.token});
  const float highest = fmaxf(a.highest, b.highest);
  return {highest, found.token,
          a.sum * expf(a.highest - highest) + b.sum * expf(b.highest - highest)};
}

// In pairs: a sum one by one would lose digits.
template <int kCount>
__device__ float sum_of(const float* values) {
  if constexpr (kCount == 1) {
    return *values;
  } else {
    return sum_of<kCount / 2>(values) + sum_of<kCount / 2>(values + kCount / 2);
  }
}

// Ascends with values, for the reductions that a warp has for integers alone.
__device__ int ordered_bits(int bits) { return bits ^ (bits >> 31 & INT_MAX); }

// Of all lanes' logits. All lanes call it, all get the result.
__device__ Summary merge_lanes(const Summary& own) {
  const int bits = __reduce_max_sync(~0U, ordered_bits(__float_as_int(own.highest)));
  const float highest = __int_as_float(ordered_bits(bits));
  const int token = __reduce_min_sync(~0U, own.highest == highest ? own.token : INT_MAX);
  double sum = own.sum * expf(own.highest - highest);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0U, sum, offset);
  return {highest, token, sum};
}

// A warp's slice of the raw logits of this cluster's row. Slices are contiguous, in the order of
// ranks and warps, and but for the first they begin at a multiple of 16 bytes.
class Slice {
 public:
  __device__ Slice(const float* logits, int vocab)
      : logits_(logits),
        shift_(static_cast<int>(reinterpret_cast<std::uintptr_t>(logits) / 4 % 4)) {
    const int warps = kCtas * kWarps;
    const int share = ((vocab + shift_ + warps - 1) / warps + 31) / 32 * 32;
    const int warp = cluster_rank() * kWarps + static_cast<int>(threadIdx.x) / 32;
    begin_ = min(vocab, max(0, share * warp - shift_));
    end_ = min(vocab, share * (warp + 1) - shift_);
  }

  // Calls f(token) for the slice's tokens, a lane each. 8 loads are in flight.
  template <typename F>
  __device__ void for_each(F f) const {
#pragma unroll 8
    for (int token = begin_ + lane(); token < end_; token += 32) f(token);
  }
  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // No __ldg, which the compiler may move to before the wait for who writes the logits.
  __device__ float raw(int token) const { return logits_[token]; }

  // Of a lane's share of the slice.
  __device__ Summary summarize() const {
    // Up to 3 tokens at either end fill no 16 bytes.
    const int whole_begin = min(end_, round_up_4(begin_));
    const int whole_end = max(whole_begin, round_up_4(end_ - 3));
    Summary all = nothing();
    for (int first = whole_begin + 4 * lane(); first < whole_end; first += 128 * kVectors) {
      all = merge(all, summarize(first, whole_end));
    }
    const int edge = lane() < 4 ? begin_ + lane() : whole_end + lane() - 4;
    const bool has_edge = lane() < 4 ? edge < whole_begin : lane() < 8 && edge < end_;
    if (has_edge) {
      const float logit = raw(edge);
      all = merge(all, {logit, edge, 1 + 0 * logit});
    }
    return all;
  }

 private:
  // To a token whose logit begins at a multiple of 16 bytes. REQUIRES: token > -4.
  __device__ int round_up_4(int token) const { return (token + shift_ + 3) / 4 * 4 - shift_; }

  // Of a lane's logits that fill 16 bytes each, from `first` on.
  __device__ Summary summarize(int first, int end) const {
    constexpr int kValues = 4 * kVectors;
    std::ptrdiff_t offset = first;
    asm("" : "+l"(offset));  // one address for all loads: the compiler would compute eight
    const auto* from = reinterpret_cast<const float4*>(logits_ + offset);
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      auto four = make_float4(kLowest, kLowest, kLowest, kLowest);
      if (first + 128 * i < end) four = from[32 * i];
      memcpy(values + 4 * i, &four, sizeof four);
    }
    float highest = kLowest;
    float nan = 0;  // or it stays 0
#pragma unroll
    for (const float value : values) {
      highest = fmaxf(highest, value);
      nan = fmaf(value, 0, nan);
    }
    int token = 0;
#pragma unroll
    for (int i = kValues - 1; i >= 0; --i) {
      if (values[i] == highest) token = first + 128 * (i / 4) + i % 4;
    }
#pragma unroll
    for (float& value : values) value = exp_approx(value - highest);
    return {highest, token, sum_of<kValues>(values) + nan};
  }

  const float* logits_;
  int shift_;  // from a multiple of 16 bytes to the row
  int begin_;
  int end_;
};

__device__ bool has_penalty(const SampleRow& row) {
  return row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0;
}

constexpr std::uint32_t kInPrompt = 0x80000000U;  // beside the count of a token in the output

// The logits of this warp's slice, as penalties and temperature leave them.
class Row : public Slice {
 public:
  __device__ Row(const Slice& slice, const SampleRow& row, int vocab, std::uint32_t* token_counts)
      : Slice(slice), row_(row), counts_(has_penalty(row) ? token_counts : nullptr) {
    if (counts_ != nullptr) count_tokens(vocab);
  }

  __device__ float penalized(int token) const { return penalize(raw(token), count(token)); }

  static constexpr int kAhead = 4;

  // The scaled logits of tokens 32 apart, 0 beyond the slice. All loads are in flight.
  template <int kCount>
  __device__ void scale(int first, float (&values)[kCount]) const {
    std::uint32_t counts[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int token = first + 32 * i;
      values[i] = token < end() ? raw(token) : 0;
      counts[i] = token < end() ? count(token) : 0;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = __fdiv_rn(penalize(values[i], counts[i]), row_.temperature);
    }
  }
  // Calls f(scaled logit) for the slice's tokens, a lane each. Loads go kAhead at once, since a
  // cluster_sync() leaves nothing in the L1 cache.
  template <typename F>
  __device__ void for_each_scaled(F f) const {
#pragma unroll 1
    for (int first = begin() + lane(); first < end(); first += 32 * kAhead) {
      float values[kAhead];
      scale(first, values);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + 32 * i < end()) f(values[i]);
      }
    }
  }

 private:
  __device__ std::uint32_t count(int token) const {
    return counts_ == nullptr ? 0 : __ldcg(counts_ + token);
  }
  // Without contraction, as on the CPU.
  __device__ float penalize(float logit, std::uint32_t count) const {
    if (count == 0) return logit;
    logit = logit > 0 ? __fdiv_rn(logit, row_.repetition_penalty)
                      : __fmul_rn(logit, row_.repetition_penalty);
    const auto in_output = static_cast<float>(count & ~kInPrompt);
    if (in_output == 0) return logit;
    return __fsub_rn(
        logit, __fadd_rn(row_.presence_penalty, __fmul_rn(row_.frequency_penalty, in_output)));
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
  std::uint32_t* counts_;
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
    const auto weight = [=, this](float scaled) { return weight_from(lowest, scaled); };
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
    const double weight = exp(static_cast<double>(scaled - highest_)) * kWeightOne;
    return weight >= 0 ? __double2ull_rn(weight) : 0;  // what is no number would become 2^63
  }
  __device__ Weight64 weight_from(float lowest, float scaled) const {
    return scaled >= lowest ? weight_of(scaled) : 0;
  }
  // Uniform in [0, total).
  __device__ Weight64 target_of(Weight64 total) const {
    const double uniform = philox_uniform(row_.seed, static_cast<std::uint64_t>(row_.position));
    return __umul64hi(static_cast<Weight64>(uniform * 0x1p53) << 11, total);
  }

  // What the filters keep is known by its weight; a search for its end finds it, and another the
  // drawn token. One loop, so that the search is in the code once.
  enum class Search : std::uint8_t { kTopK, kTopP, kDraw };

  __device__ bool is_wanted(Search search) const {
    if (search == Search::kTopK) return row_.top_k > 0 && row_.top_k < vocab_;
    return search == Search::kDraw || row_.top_p < 1;
  }
  // The running count or weight that the search asks for.
  __device__ Weight64 target_of(Search search, Weight64 kept) const {
    if (search == Search::kTopK) return static_cast<Weight64>(row_.top_k - 1);
    if (search == Search::kDraw) return target_of(kept);
    const double wanted = ceil(static_cast<double>(row_.top_p) * static_cast<double>(kept));
    return wanted < 1 ? 0 : min(static_cast<Weight64>(wanted), kept) - 1;
  }

  __device__ int draw_best_first(float lowest) {
    Weight64 kept = fill_buckets();
    Weight64 above_min_p = kept;
    if (row_.min_p > 0) {
      above_min_p = sum_up([=, this](float scaled) { return weight_from(lowest, scaled); }).total;
    }
    Place place{};
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {
      const auto search = static_cast<Search>(i);
      if (!is_wanted(search)) continue;
      kept = min(kept, above_min_p);
      place = find_place(search == Search::kTopK, target_of(search, kept));
      kept = place.weight_through;
    }
    const auto is_tie = [place](float scaled) -> Weight64 {
      return falling_bits(scaled) == place.bits ? 1 : 0;
    };
    return token_at(sum_up(is_tie), place.tie, is_tie);
  }

  // ---- in the order of tokens ----

  template <typename Measure>
  __device__ Sums sum_up(Measure measure) {
    Weight64 own = 0;
    logits_.for_each_scaled([&](float scaled) { own += measure(scaled); });
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
      constexpr int kAhead = Row::kAhead;
      for (int first = logits_.begin(); first < logits_.end() && before <= target;
           first += 32 * kAhead) {
        float scaled[kAhead];
        logits_.scale(first + Row::lane(), scaled);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int token = first + 32 * i + Row::lane();
          const Weight64 own = token < logits_.end() ? measure(scaled[i]) : 0;
          const Weight64 through = before + warp_inclusive_sum(own);
          if (through - own <= target && target < through) *at_rank(&shared_.token, 0) = token;
          before = __shfl_sync(~0U, through, 31);
        }
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
  // Makes every CTA's histogram the sum of all. Each CTA adds up a share of the bins, half of its
  // threads the counts and half the weights.
  template <int kBins>
  __device__ void merge(Histogram<kBins>& histogram) const {
    constexpr int kShare = kBins / kCtas;
    constexpr int kHalf = kThreads / 2;
    static_assert(kShare <= kHalf);
    cluster_sync();
    const int thread = static_cast<int>(threadIdx.x);
    const int bin = cluster_rank() * kShare + thread % kHalf;
    if (thread % kHalf < kShare) {
      if (thread < kHalf) {
        merge(histogram.counts + bin);
      } else {
        merge(histogram.weights + bin);
      }
    }
    cluster_sync();
  }
  template <typename T>
  __device__ void merge(T* bin) const {
    T sum = 0;
    for (int rank = 0; rank < kCtas; ++rank) sum += *at_rank(bin, rank);
    for (int rank = 0; rank < kCtas; ++rank) *at_rank(bin, rank) = sum;
  }

  // The bin in which the running count or weight passes `target`.
  template <int kBins>
  __device__ Bin find_bin(const Histogram<kBins>& histogram, bool by_count, Weight64 target) const {
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
      const Weight64 before = by_count ? bin.count_before : bin.weight_before;
      const Weight64 own = by_count ? bin.count : bin.weight;
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
    logits_.for_each_scaled(
        [this](float scaled) { add(shared_.buckets, bucket_of(scaled), scaled); });
    merge(shared_.buckets);
    Weight64 weight = 0;
    for (int i = threadIdx.x; i < kBuckets; i += kThreads) weight += shared_.buckets.weights[i];
    return reducer_.over_cta(weight, [](Weight64 a, Weight64 b) { return a + b; });
  }

  // The first token, best first, whose running count or weight is above `target`.
  __device__ Place find_place(bool by_count, Weight64 target) {
    const Bin bucket = find_bin(shared_.buckets, by_count, target);
    unsigned count = bucket.count_before;
    Weight64 weight = bucket.weight_before;
    Bin digit{};
    std::uint32_t prefix = 0;  // of the bits of those that are looked at, `known` bits
#pragma unroll 1
    for (int known = 0; known < 32; known += 11) {
      const int bits = known < 22 ? 11 : 10;
      clear(shared_.digits);
      logits_.for_each_scaled([&](float scaled) {
        if (bucket_of(scaled) != bucket.index) return;
        const std::uint32_t all = falling_bits(scaled);
        if (known > 0 && all >> (32 - known) != prefix) return;
        add(shared_.digits, static_cast<int>(all << known >> (32 - bits)), scaled);
      });
      merge(shared_.digits);
      digit = find_bin(shared_.digits, by_count, target - (by_count ? count : weight));
      count += digit.count_before;
      weight += digit.weight_before;
      prefix = prefix << bits | static_cast<std::uint32_t>(digit.index);
    }
    const Weight64 each = digit.weight / digit.count;  // of equal logits
    const Weight64 tie = by_count ? target - count : (target - weight) / each;
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

// Of the whole row. Also brings what is asked of the row to shared memory, beside the logits.
__device__ Summary summarize(const Slice& slice, const SampleRow& row,
                             Exchange<Summary, kCtas>& exchange, SharedMemory& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  static_assert(sizeof row % 8 == 0);
  if (thread < static_cast<int>(sizeof row / 8)) {
    copy_async<8>(shared.row + 8 * thread, reinterpret_cast<const std::byte*>(&row) + 8 * thread);
  }
  commit_copies();
  const Summary warp = merge_lanes(slice.summarize());
  wait_copies<0>();  // seen by all after the barrier below
  if (Slice::lane() == 0) shared.warps[thread / 32] = warp;
  exchange.await_peers();
  __syncthreads();
  if (thread < 32) {
    const Summary cta = merge_lanes(thread < kWarps ? shared.warps[thread] : nothing());
    if (thread < kCtas) exchange.post(cta, thread);
  }
  const Summary* ctas = exchange.await();
  return merge_lanes(Slice::lane() < kCtas ? ctas[Slice::lane()] : nothing());
}

// The `count` best raw logits, best first: those of each slice, then of these.
__device__ void report_best(const Slice& logits, int count, float normalizer, SampledToken& out,
                            SharedMemory& shared) {
  Reducer<kThreads, kCtas> reducer(shared.reducer);
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

__device__ void write_state(const SampleRow& row, int num_top) {
  row.out->num_top = num_top;
  row.out->mismatches = row.mismatches == nullptr ? 0 : *row.mismatches;
}

__device__ void write_token(const SampleRow& row, int token, float logprob) {
  if (cluster_rank() != 0 || threadIdx.x != 0) return;
  row.out->token = token;
  row.out->logprob = logprob;
  if (row.append) row.tokens[row.num_tokens] = token;
}

// What penalties and temperature make of a row whose raw logits have `highest`.
__device__ void choose(const SampleArgs& args, std::uint32_t* token_counts, Candidate highest,
                       float normalizer, SharedMemory& shared) {
  const std::size_t index = blockIdx.x / kCtas;
  const auto& row = *reinterpret_cast<const SampleRow*>(shared.row);
  const Row logits(Slice(args.logits + index * args.vocab, args.vocab), row, args.vocab,
                   token_counts + index * args.vocab);
  Reducer<kThreads, kCtas> reducer(shared.reducer);
  if (has_penalty(row)) {
    Candidate own{-INFINITY, INT_MAX};
    logits.for_each([&](int token) { own = best(own, {logits.penalized(token), token}); });
    highest = reducer.over_cluster(own, best);
  }
  int token = highest.token;
  if (row.temperature > 0) {
    const float scaled = __fdiv_rn(highest.logit, row.temperature);
    token = Sampler(row, logits, scaled, args.vocab, reducer, shared).draw();
  }
  // On other ranks `token` may be no token: only rank 0 reads its logit.
  if (cluster_rank() == 0) write_token(row, token, logits.raw(token) - normalizer);
}

__global__ void __cluster_dims__(kCtas, 1, 1) __launch_bounds__(kThreads, 2)
    sample_kernel(const __grid_constant__ SampleArgs args, std::uint32_t* token_counts) {
  __shared__ SharedMemory shared;
  allow_next_kernel();
  Exchange<Summary, kCtas> exchange(shared.exchange);
  exchange.begin();
  const std::size_t index = blockIdx.x / kCtas;
  const Slice slice(args.logits + index * args.vocab, args.vocab);
  wait_for_earlier_kernels();
  const Summary all = summarize(slice, args.rows[index], exchange, shared);
  const auto& row = *reinterpret_cast<const SampleRow*>(shared.row);
  const bool finite = isfinite(all.sum);
  const int num_top = finite ? min(max(row.num_logprobs, 0), min(kMaxLogprobs, args.vocab)) : 0;
  // A warp that writes no token, so that the read of the count delays none.
  if (cluster_rank() == 0 && threadIdx.x == 32) write_state(row, num_top);
  if (!finite) return write_token(row, 0, -INFINITY);

  const auto normalizer = static_cast<float>(all.highest + log(all.sum));
  const bool forced = row.forced >= 0 && row.forced < args.vocab;
  const bool chooses = !forced && (row.temperature > 0 || has_penalty(row));
  const auto write_known = [&] {
    const float logit = forced ? slice.raw(row.forced) : all.highest;
    write_token(row, forced ? row.forced : all.token, logit - normalizer);
  };
  // Unlikely, so that a greedy row's code ends where it stands, and not far behind all the other.
  if (chooses || num_top > 0) [[unlikely]] {
    if (num_top > 0) report_best(slice, num_top, normalizer, *row.out, shared);
    if (chooses) {
      choose(args, token_counts, {all.highest, all.token}, normalizer, shared);
    } else if (cluster_rank() == 0) {
      write_known();
    }
    cluster_sync();  // others may still read this CTA's shared memory
  } else if (cluster_rank() == 0) {
    write_known();
  }
}

}  // namespace

void sample(const SampleArgs& args, CudaStream& stream) {
  FT_CHECK(args.vocab > 0 && args.vocab <= kMaxVocab, args.vocab);
  if (args.num_rows == 0) return;
  FT_CHECK(args.token_counts != nullptr);
  launch_overlapped(sample_kernel, args.num_rows * kCtas, kThreads, 0, stream, args,
                    args.token_counts);
}

}  // namespace foretoken::kernels::cuda
