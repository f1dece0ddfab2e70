// gemv: out = x W^T for a few rows of x, bound by reading W once from device memory.
//
// A CTA an SM makes a run of neighbouring features, a warp one of them (swiglu: a gate and its up)
// at a time, for all rows. The warp reads the feature's row of W 512 neighbouring bytes a load;
// that order of reading is what reaches the memory's speed (docs/measurements.md); tensor cores
// would want 8 or 16 rows of W side by side. Loads run kAhead steps ahead of the products, over the
// ends of rows too, through a ring in shared memory: a lane reads what it has loaded itself, so
// nothing waits for other lanes. The ring needs nothing of earlier kernels, and fills as soon as
// the kernel before leaves the SM. An SM has room for one CTA alone: two of a kernel that starts
// early would share one, and leave another without.
//
// The RMS norm is folded in: sum_k w[k] x[k] W[n, k], times 1 / rms(x) at the end.
#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/product_out.cuh"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 256;  // columns that a warp's 16-byte loads cover
constexpr int kRing = 16;   // loads of a lane: 128 KB a CTA, more than half of an SM's

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
};

// 8 values of x under the norm's weights; adds their squares.
template <typename T>
__device__ uint4 apply_norm(uint4 x, const float* weight, float& squares) {
  auto* pairs = reinterpret_cast<std::uint32_t*>(&x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 value = unpack<T>(pairs[i]);
    squares += value.x * value.x + value.y * value.y;
    pairs[i] = pack<T>(value.x * weight[2 * i], value.y * weight[2 * i + 1]);
  }
  return x;
}

// Behind it: the rows of x, [kRows, columns rounded up to kStep], zeros behind each.
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

template <int kRows, bool kNorm, typename T>
__device__ void stage_x(const GemvParams<T>& p, int stride, SharedMemory& shared) {
  for (int row = 0; row < kRows; ++row) {
    float squares = 0;
    for (int i = 8 * threadIdx.x; i < stride; i += 8 * kThreads) {
      uint4 x{0, 0, 0, 0};
      if (row < p.rows && i < p.columns) {
        x = *reinterpret_cast<const uint4*>(p.x + static_cast<std::size_t>(row) * p.columns + i);
        if constexpr (kNorm) x = apply_norm<T>(x, p.norm_weight + i, squares);
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

// The features of a warp: first, first + kWarps, ... of its CTA's run.
struct Features {
  int first;
  int end;
  __device__ explicit Features(int num_features) {
    const auto bound = [&](unsigned cta) {
      return static_cast<int>(static_cast<std::int64_t>(num_features) * cta / gridDim.x);
    };
    first = bound(blockIdx.x) + static_cast<int>(threadIdx.x) / 32;
    end = bound(blockIdx.x + 1);
  }
};

// This lane's part of its warp's rows of W, step after step, through the ring.
template <typename T, int kParts>
class WeightStream {
 public:
  static constexpr int kAhead = kRing / kParts;

  __device__ WeightStream(const GemvParams<T>& p, const Features& features, SharedMemory& shared)
      : lane_column_(8 * (static_cast<int>(threadIdx.x) % 32)),
        from_(p.weight + static_cast<std::size_t>(features.first) * p.columns + lane_column_),
        part_stride_(static_cast<std::size_t>(p.num_features / kParts) * p.columns),
        columns_(p.columns),
        column_(lane_column_),
        feature_(features.first),
        end_(features.end),
        ring_(&shared.ring[0][threadIdx.x]) {}

  // Starts the next load. Past the last row there is none, but it counts.
  __device__ void load() {
    if (feature_ < end_) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        // Columns past the row's end become zeros.
        copy_async(ring_ + (slot_ * kParts + part) * kThreads,
                   column_ < columns_ ? from_ + part * part_stride_ : from_ - column_,
                   column_ < columns_);
      }
    }
    commit_copies();
    slot_ = slot_ + 1 == kAhead ? 0 : slot_ + 1;
    column_ += kStep;
    from_ += kStep;
    const int begin = column_ - lane_column_;  // of the warp's step
    if (begin < columns_) return;
    from_ += kWarps * static_cast<std::ptrdiff_t>(columns_) - begin;  // the warp's next feature
    column_ = lane_column_;
    feature_ += kWarps;
  }

  // The oldest load that was not taken yet. REQUIRES: kAhead are under way.
  __device__ void take(uint4 (&w)[kParts]) {
    wait_copies<kAhead - 1>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) w[part] = ring_[(slot_ * kParts + part) * kThreads];
  }

 private:
  int lane_column_;
  const T* from_;
  std::size_t part_stride_;
  int columns_;
  int column_;
  int feature_;
  int end_;
  uint4* ring_;
  int slot_ = 0;  // of the oldest load under way, once all slots are taken
};

template <typename T>
__device__ void add_dot(uint4 a, uint4 b, float2& sum) {
  const auto* a_pairs = reinterpret_cast<const std::uint32_t*>(&a);
  const auto* b_pairs = reinterpret_cast<const std::uint32_t*>(&b);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(a_pairs[i]);
    const float2 y = unpack<T>(b_pairs[i]);
    sum.x += x.x * y.x;
    sum.y += x.y * y.y;
  }
}

// A feature's results, by one lane.
template <typename Out, int kRows, int kParts, bool kNorm, typename T>
__device__ void store_feature(const GemvParams<T>& p, int feature,
                              const float (&sums)[kParts][kRows], const SharedMemory& shared) {
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    if (n >= p.rows) return;
    const float scale = kNorm ? shared.inverse_rms[n] : 1.0F;
    float scaled[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) scaled[part] = sums[part][n] * scale;
    store_product<Out, kParts>(p.out, n, feature, scaled);
  }
}

// The bound of 3 keeps a thread to 40 registers: the gather and the choice run on the same SMs.
template <typename T, typename Out, int kRows, bool kNorm, bool kSwiGlu>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 3 : 2) gemv_kernel(const GemvParams<T> p) {
  constexpr int kParts = kSwiGlu ? 2 : 1;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SharedMemory*>(memory);
  allow_next_kernel();
  const Features features(p.num_features / kParts);
  WeightStream<T, kParts> weight(p, features, shared);
  for (int i = 0; i < weight.kAhead; ++i) weight.load();

  wait_for_earlier_kernels();
  const int stride = (p.columns + kStep - 1) / kStep * kStep;
  stage_x<kRows, kNorm>(p, stride, shared);
  const T* x = shared.x<T>() + 8 * (threadIdx.x % 32);
  for (int feature = features.first; feature < features.end; feature += kWarps) {
    float2 pairs[kParts][kRows] = {};
#pragma unroll 4
    for (int column = 0; column < stride; column += kStep) {
      uint4 w[kParts];
      weight.take(w);
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const uint4 values = *reinterpret_cast<const uint4*>(x + n * stride + column);
#pragma unroll
        for (int part = 0; part < kParts; ++part) add_dot<T>(w[part], values, pairs[part][n]);
      }
      weight.load();
    }
    float sums[kParts][kRows];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        sums[part][n] = warp_sum(pairs[part][n].x + pairs[part][n].y);
      }
    }
    if (threadIdx.x % 32 == 0) store_feature<Out, kRows, kParts, kNorm>(p, feature, sums, shared);
  }
}

std::size_t shared_bytes(int rows, int columns) {
  const auto stride = static_cast<std::size_t>((columns + kStep - 1) / kStep * kStep);
  return sizeof(SharedMemory) + sizeof(std::uint16_t) * static_cast<std::size_t>(rows) * stride;
}

template <typename T, int kRows>
void run(const LinearArgs& args, CudaStream& stream) {
  const auto& weight = static_cast<const CudaWeight&>(*args.weight);
  const bool swiglu = args.swiglu.scratch != nullptr;
  const GemvParams<T> params{static_cast<const T*>(args.x),
                             weight.memory.as<T>(),
                             args.norm.weight,
                             args.norm.eps,
                             {args.bias, static_cast<const T*>(args.residual), args.out,
                              swiglu ? weight.rows / 2 : weight.rows},
                             args.rows,
                             weight.rows,
                             weight.columns};
  const bool norm = args.norm.weight != nullptr;
  FT_CHECK(!(swiglu && args.out_fp32));
  static const int sms = num_sms();
  const int ctas = std::min(sms, swiglu ? weight.rows / 2 : weight.rows);
  const auto start = [&](auto kernel) {
    const std::size_t bytes = shared_bytes(kRows, weight.columns);
    FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
    launch_overlapped(kernel, ctas, kThreads, bytes, stream, params);
  };
  if (swiglu) {
    return norm ? start(gemv_kernel<T, T, kRows, true, true>)
                : start(gemv_kernel<T, T, kRows, false, true>);
  }
  if (args.out_fp32) {
    return norm ? start(gemv_kernel<T, float, kRows, true, false>)
                : start(gemv_kernel<T, float, kRows, false, false>);
  }
  norm ? start(gemv_kernel<T, T, kRows, true, false>)
       : start(gemv_kernel<T, T, kRows, false, false>);
}

}  // namespace

bool can_gemv(const LinearArgs& args) {
  constexpr std::size_t kMaxSharedBytes = 224 << 10;
  if (args.rows > kMaxGemvRows || args.weight->columns % 8 != 0) return false;
  return shared_bytes(args.rows, args.weight->columns) <= kMaxSharedBytes;
}

void gemv(const LinearArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(can_gemv(args), args.rows, args.weight->columns);
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.rows == 1 ? run<T, 1>(args, stream) : run<T, kMaxGemvRows>(args, stream);
  });
}

}  // namespace foretoken::kernels::cuda
