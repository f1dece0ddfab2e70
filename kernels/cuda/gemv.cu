// gemv: out = x W^T for a few rows of x, bound by reading W once from device memory.
//
// A CTA an SM makes a run of neighbouring features, a warp one of them (swiglu: a gate and its up)
// at a time, for all rows. The warp reads the feature's row of W 512 neighbouring bytes a load;
// that order of reading is what reaches the memory's speed (docs/measurements.md); tensor cores
// would want 8 or 16 rows of W side by side. Loads run kRing ahead of the products, over the ends
// of rows too, through a ring in shared memory: a lane reads what it has loaded itself, so nothing
// waits for other lanes. They go by groups of neighbours, which share the work of addresses and of
// waiting: a full ring is soon worked off where little of it is instructions. The ring needs
// nothing of earlier kernels, and fills as soon as the kernel before leaves the SM. An SM has room
// for one CTA alone: two of a kernel that starts early would share one, and leave another without.
//
// The RMS norm is folded in: sum_k w[k] x[k] W[n, k], times 1 / rms(x) at the end.
//
// Where ranks share the work, what a product made is summed without a kernel of its own
// (peer_links.cuh): lanes send a feature, one to each rank, and the product that takes the sum as
// its x adds it up there, while its ring fills.
#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/loads.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/peer_links.cuh"
#include "kernels/cuda/product_out.cuh"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 256;  // columns that a warp's 16-byte loads cover
constexpr int kRing = 16;   // loads of a lane: 128 KB a CTA, more than half of an SM's
constexpr int kGroup = 4;   // loads of a lane that are started, and waited for, at once
constexpr int kGroups = kRing / kGroup;

template <typename T>
struct GemvParams {
  const T* x;
  const T* weight;
  const float* norm_weight;
  float norm_eps;
  ProductOut<T> out;
  int rows;
  int num_features;  // of the product
  int columns;
  int features_a_cta;  // of out; the first CTAs have one more
  int ctas_with_more;
  PeerLinks links;
  T* sum;  // where the CTAs store x, if it is received
};

// 8 values of x under the norm's weights; adds their squares.
template <typename T>
__device__ uint4 apply_norm(uint4 x, const float (&weight)[8], float& squares) {
  auto* pairs = reinterpret_cast<std::uint32_t*>(&x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 value = unpack<T>(pairs[i]);
    squares += value.x * value.x + value.y * value.y;
    pairs[i] = pack<T>(value.x * weight[2 * i], value.y * weight[2 * i + 1]);
  }
  return x;
}

// Behind it: the rows of x, [kRows, columns of whole groups], zeros behind each.
struct alignas(16) SharedMemory {
  uint4 ring[kRing][kThreads];
  float squares[kMaxGemvRows][kWarps];
  float inverse_rms[kMaxGemvRows];

  template <typename T>
  __device__ T* x() {
    return reinterpret_cast<T*>(this + 1);
  }
};

static_assert(sizeof(SharedMemory) > (114 << 10), "two CTAs would fit an SM");

// 8 values of x, of which one CTA stores the sum.
template <bool kReceives, typename T>
__device__ uint4 load_x(const GemvParams<T>& p, std::uint32_t call, int row, int column) {
  if constexpr (!kReceives) {
    return *reinterpret_cast<const uint4*>(p.x + static_cast<std::size_t>(row) * p.columns +
                                           column);
  } else {
    const uint4 x = receive_sum<T>(p.links, call, column);
    if (column / 8 % gridDim.x == blockIdx.x) *reinterpret_cast<uint4*>(p.sum + column) = x;
    return x;
  }
}

template <int kRows, bool kNorm, bool kReceives, typename T>
__device__ void stage_x(const GemvParams<T>& p, std::uint32_t call, int stride,
                        SharedMemory& shared) {
  for (int row = 0; row < kRows; ++row) {
    float squares = 0;
    for (int i = 8 * threadIdx.x; i < stride; i += 8 * kThreads) {
      uint4 x{0, 0, 0, 0};
      if (row < p.rows && i < p.columns) {
        float norm[8];
        if constexpr (kNorm) {  // before x, which may have to be waited for
#pragma unroll
          for (int k = 0; k < 8; ++k) norm[k] = p.norm_weight[i + k];
        }
        x = load_x<kReceives>(p, call, row, i);
        if constexpr (kNorm) x = apply_norm<T>(x, norm, squares);
      }
      *reinterpret_cast<uint4*>(shared.x<T>() + row * stride + i) = x;
    }
    if constexpr (kNorm) {
      squares = warp_sum(squares);
      if (threadIdx.x % 32 == 0) shared.squares[row][threadIdx.x / 32] = squares;
    }
  }
  __syncthreads();
  if constexpr (!kNorm) return;
  if (threadIdx.x < kRows) {
    float squares = 0;
    for (const float part : shared.squares[threadIdx.x]) squares += part;
    shared.inverse_rms[threadIdx.x] = rsqrtf(squares / static_cast<float>(p.columns) + p.norm_eps);
  }
  __syncthreads();
}

// Columns up to the end of a group of loads; of SwiGLU (kParts = 2) a gate's and its up's.
template <int kParts>
__host__ __device__ int whole_groups(int columns) {
  constexpr int kColumns = kGroup / kParts * kStep;
  return (columns + kColumns - 1) / kColumns * kColumns;
}

// The features of a warp: first, first + kWarps, ... of its CTA's run.
struct Features {
  int first;
  int end;
  template <typename T>
  __device__ explicit Features(const GemvParams<T>& p) {
    const int cta = static_cast<int>(blockIdx.x);
    const int begin = p.features_a_cta * cta + min(cta, p.ctas_with_more);
    first = begin + static_cast<int>(threadIdx.x / 32);
    end = begin + p.features_a_cta + (cta < p.ctas_with_more ? 1 : 0);
  }
};

// This lane's part of its warp's rows of W, step after step, through the ring. Steps go by groups,
// which share the work of waiting and of addresses; a row's end fills its last group with zeros.
template <typename T, int kParts>
class WeightStream {
 public:
  static constexpr int kSteps = kGroup / kParts;  // of a group
  static constexpr int kColumns = kSteps * kStep;

  __device__ WeightStream(const GemvParams<T>& p, const Features& features, SharedMemory& shared)
      : from_(p.weight + static_cast<std::size_t>(features.first) * p.columns + lane_column()),
        part_stride_(static_cast<std::size_t>(p.num_features / kParts) * p.columns),
        row_stride_(p.columns),
        columns_(p.columns),
        left_(columns_ - lane_column()),
        features_left_(features.end - features.first),
        ring_(&shared.ring[0][0]),
        slot_(threadIdx.x) {}

  // Starts the loads of a step of the newest group. Past the last row there are none.
  __device__ void load(int step) {
    if (features_left_ <= 0) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      copy_async(slot(step, part), from_ + part * part_stride_ + step * kStep,
                 step * kStep < left_);
    }
  }
  // Ends the newest group, and begins another.
  __device__ void next_group() {
    commit_copies();
    slot_ = (slot_ + kGroup * kThreads) % (kRing * kThreads);
    from_ += kColumns;
    left_ -= kColumns;
    const int warp_left = left_ + lane_column();
    if (warp_left > 0) return;
    from_ += kWarps * row_stride_ + warp_left - columns_;
    left_ = columns_ - lane_column();
    features_left_ -= kWarps;
  }

  // Waits for the oldest group, whose slots the newest one takes. REQUIRES: kGroups have ended.
  __device__ void wait() { wait_copies<kGroups - 1>(); }
  __device__ void take(int step, uint4 (&w)[kParts]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) w[part] = *slot(step, part);
  }

 private:
  static __device__ int lane_column() { return static_cast<int>(8 * (threadIdx.x % 32)); }
  __device__ uint4* slot(int step, int part) {
    return ring_ + slot_ + (step * kParts + part) * kThreads;
  }

  const T* from_;
  std::size_t part_stride_;
  int row_stride_;
  int columns_;
  int left_;  // of the row, from the lane's first of the newest group
  int features_left_;
  uint4* ring_;
  unsigned slot_;  // of this lane and the newest group
};

// 16-bit values as fp32, of bf16 by one instruction each.
template <typename T>
__device__ float2 widen(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U)};
  } else {
    return unpack<T>(pair);
  }
}

template <typename T>
__device__ void add_dot(uint4 a, uint4 b, float2& sum) {
  const auto* a_pairs = reinterpret_cast<const std::uint32_t*>(&a);
  const auto* b_pairs = reinterpret_cast<const std::uint32_t*>(&b);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = widen<T>(a_pairs[i]);
    const float2 y = widen<T>(b_pairs[i]);
    sum.x += x.x * y.x;
    sum.y += x.y * y.y;
  }
}

template <int kRows, int kParts, typename T>
__device__ void load_addends(const GemvParams<T>& p, int feature,
                             Addends<kParts, T> (&addends)[kRows]) {
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    if (n < p.rows) addends[n] = load_addends<kParts>(p.out, n, feature);
  }
}

// A feature's results, by one lane; what is sent, to each rank by a lane of its own.
template <typename Out, int kRows, int kParts, bool kNorm, bool kSends, typename T>
__device__ void store_feature(const GemvParams<T>& p, std::uint32_t call, int feature,
                              const float (&sums)[kParts][kRows],
                              const Addends<kParts, T> (&addends)[kRows],
                              const SharedMemory& shared) {
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    if (n >= p.rows) return;
    const float scale = kNorm ? shared.inverse_rms[n] : 1.0F;
    float scaled[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      // Not as part of an FFMA, so that all kernels' bits agree.
      scaled[part] = __fmul_rn(sums[part][n], scale);
    }
    if constexpr (kSends) {
      send_to<T>(p.links, static_cast<int>(threadIdx.x % 32), call, feature,
                 finish_product(scaled, addends[n]));
    } else {
      store_product<Out>(p.out, n, feature, scaled, addends[n]);
    }
  }
}

// The bound of 3 keeps a thread to 40 registers: the gather and the choice run on the same SMs.
// kLinked, of one row: x is a sum that is received, or without a norm, what is made is sent.
template <typename T, typename Out, int kRows, bool kNorm, bool kSwiGlu, bool kLinked>
__global__ void __launch_bounds__(kThreads, kRows == 1 && !kLinked ? 3 : 2)
    gemv_kernel(const GemvParams<T> p) {
  constexpr bool kReceives = kLinked && kNorm;
  constexpr bool kSends = kLinked && !kNorm;
  constexpr int kParts = kSwiGlu ? 2 : 1;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SharedMemory*>(memory);
  allow_next_kernel();
  const Features features(p);
  WeightStream<T, kParts> weight(p, features, shared);
  for (int i = 0; i < kGroups; ++i) {
    for (int step = 0; step < weight.kSteps; ++step) weight.load(step);
    weight.next_group();
  }
  // So that the norm's weights are near when x is there.
  if constexpr (kNorm) prefetch(p.norm_weight, sizeof(float) * static_cast<unsigned>(p.columns));

  wait_for_earlier_kernels();
  const int stride = whole_groups<kParts>(p.columns);
  std::uint32_t call = 0;
  if constexpr (kLinked) call = p.links.calls[blockIdx.x] + (kSends ? 1 : 0);
  stage_x<kRows, kNorm, kReceives>(p, call, stride, shared);
  const T* const x = shared.x<T>() + 8 * (threadIdx.x % 32);
  for (int feature = features.first; feature < features.end; feature += kWarps) {
    Addends<kParts, T> addends[kRows];
    // Read while the sums are made, by all lanes, which costs no more than by one. A gate's and its
    // up's would be too many for the registers, and models hardly have them.
    if constexpr (!kSwiGlu) load_addends(p, feature, addends);
    float2 pairs[kParts][kRows] = {};
    const T* at = x;
    int left = p.columns;
#pragma unroll 1
    do {
      weight.wait();
#pragma unroll
      for (int step = 0; step < weight.kSteps; ++step) {
        uint4 w[kParts];
        weight.take(step, w);
        weight.load(step);
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          const auto values = *reinterpret_cast<const uint4*>(at + n * stride + step * kStep);
#pragma unroll
          for (int part = 0; part < kParts; ++part) add_dot<T>(w[part], values, pairs[part][n]);
        }
      }
      weight.next_group();
      at += weight.kColumns;
      left -= weight.kColumns;
    } while (left > 0);
    float sums[kParts][kRows];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        sums[part][n] = warp_sum(pairs[part][n].x + pairs[part][n].y);
      }
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < (kSends ? p.links.world_size : 1)) {
      if constexpr (kSwiGlu) load_addends(p, feature, addends);
      store_feature<Out, kRows, kParts, kNorm, kSends>(p, call, feature, sums, addends, shared);
    }
  }
  if (kSends && threadIdx.x == 0) count_call(p.links, call);
}

std::size_t shared_bytes(int rows, int columns) {
  const auto stride = static_cast<std::size_t>(whole_groups<1>(columns));  // the widest
  return sizeof(SharedMemory) + sizeof(std::uint16_t) * static_cast<std::size_t>(rows) * stride;
}

// sum: over what a product without a norm sends, and one with a norm receives its x; null: neither.
template <typename T, int kRows>
void run(const LinearArgs& args, const PeerSum* sum, CudaStream& stream) {
  const auto& weight = static_cast<const CudaWeight&>(*args.weight);
  const bool swiglu = args.swiglu.scratch != nullptr;
  const bool norm = args.norm.weight != nullptr;
  FT_CHECK(!(swiglu && args.out_fp32));
  GemvParams<T> params{static_cast<const T*>(args.x),
                       weight.memory.as<T>(),
                       args.norm.weight,
                       args.norm.eps,
                       {args.bias, static_cast<const T*>(args.residual), args.out,
                        swiglu ? weight.rows / 2 : weight.rows},
                       args.rows,
                       weight.rows,
                       weight.columns,
                       0,
                       0,
                       {},
                       static_cast<T*>(const_cast<void*>(args.x))};
  static const int sms = num_sms();
  int ctas = sms;
  if (sum != nullptr) {
    params.links = links_of(*sum);
    // Who waits for a rank of the same GPU leaves it room, as do kernels that have started behind.
    if (params.links.ranks_here > 1) ctas = std::max(1, ctas / (4 * params.links.ranks_here));
  }
  ctas = std::min(ctas, params.out.columns);
  params.features_a_cta = params.out.columns / ctas;
  params.ctas_with_more = params.out.columns % ctas;
  const auto start = [&](auto kernel) {
    const std::size_t bytes = shared_bytes(kRows, weight.columns);
    FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
    launch_overlapped(kernel, ctas, kThreads, bytes, stream, params);
  };
  if constexpr (kRows == 1) {
    if (sum != nullptr) {
      if (!norm) return start(gemv_kernel<T, T, 1, false, false, true>);
      if (swiglu) return start(gemv_kernel<T, T, 1, true, true, true>);
      return args.out_fp32 ? start(gemv_kernel<T, float, 1, true, false, true>)
                           : start(gemv_kernel<T, T, 1, true, false, true>);
    }
  }
  if (swiglu) {
    return norm ? start(gemv_kernel<T, T, kRows, true, true, false>)
                : start(gemv_kernel<T, T, kRows, false, true, false>);
  }
  if (args.out_fp32) {
    return norm ? start(gemv_kernel<T, float, kRows, true, false, false>)
                : start(gemv_kernel<T, float, kRows, false, false, false>);
  }
  norm ? start(gemv_kernel<T, T, kRows, true, false, false>)
       : start(gemv_kernel<T, T, kRows, false, false, false>);
}

void start(const LinearArgs& args, const PeerSum* sum, DataType activation, CudaStream& stream) {
  FT_CHECK(can_gemv(args), args.rows, args.weight->columns);
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& start_rows = args.rows == 1 ? run<T, 1> : run<T, kMaxGemvRows>;
    start_rows(args, sum, stream);
  });
}

}  // namespace

bool can_gemv(const LinearArgs& args) {
  constexpr std::size_t kMaxSharedBytes = 224 << 10;
  if (args.rows > kMaxGemvRows || args.weight->columns % 8 != 0) return false;
  return shared_bytes(args.rows, args.weight->columns) <= kMaxSharedBytes;
}

void gemv(const LinearArgs& args, DataType activation, CudaStream& stream) {
  start(args, nullptr, activation, stream);
}

bool can_chain(const LinearChainArgs& args) {
  bool receives = false;
  for (std::size_t i = 0; i < args.products.size(); ++i) {
    const LinearArgs& product = args.products[i];
    const bool sends = (args.summed >> i & 1U) != 0;
    const bool norm = product.norm.weight != nullptr;
    if (product.rows != 1 || !can_gemv(product)) return false;
    // What receives a sum stores it for all who come later.
    if (receives && (!norm || product.x != args.products[i - 1].out)) return false;
    if (sends) {
      const bool is_plain = !norm && !product.out_fp32 && product.swiglu.scratch == nullptr;
      if (!is_plain || args.sum == nullptr) return false;
      if (!args.sum->takes_in_chain(product.weight->rows)) return false;
    }
    receives = sends;
  }
  return args.summed != 0 && !receives;
}

void run_chain(const LinearChainArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(can_chain(args), args.products.size());
  bool receives = false;
  for (std::size_t i = 0; i < args.products.size(); ++i) {
    const bool sends = (args.summed >> i & 1U) != 0;
    start(args.products[i], sends || receives ? args.sum : nullptr, activation, stream);
    receives = sends;
  }
}

}  // namespace foretoken::kernels::cuda
