// gemv: out = x W^T for a few rows of x, bound by reading W once from device memory.
//
// A warp makes one feature (swiglu: a gate and its up) of all rows: it streams the feature's row of
// W, 512 neighbouring bytes a load, several loads ahead. That order of reading is what reaches the
// memory's speed (docs/measurements.md); tensor cores would want 8 or 16 rows of W side by side.
// The first loads are issued before the kernel waits for x, which then lies in shared memory.
//
// The RMS norm is folded in: sum_k w[k] x[k] W[n, k], times 1 / rms(x) at the end.
#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 256;  // columns that a warp's 16-byte loads cover

template <typename T>
struct GemvParams {
  const T* x;
  const T* weight;
  const float* bias;
  const float* norm_weight;
  float norm_eps;
  const T* residual;
  void* out;
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

// The rows of x in shared memory, [kRows, columns rounded up to kStep], zeros behind each.
template <typename T, int kRows, bool kNorm>
struct StagedRows {
  T* values;
  int stride;
  float* inverse_rms;  // [kRows]

  __device__ void stage(const GemvParams<T>& p) {
    __shared__ float parts[kRows][kWarps];
    for (int row = 0; row < kRows; ++row) {
      float squares = 0;
      for (int i = 8 * threadIdx.x; i < stride; i += 8 * kThreads) {
        uint4 x{0, 0, 0, 0};
        if (row < p.rows && i < p.columns) {
          x = *reinterpret_cast<const uint4*>(p.x + static_cast<std::size_t>(row) * p.columns + i);
          if constexpr (kNorm) x = apply_norm<T>(x, p.norm_weight + i, squares);
        }
        *reinterpret_cast<uint4*>(values + row * stride + i) = x;
      }
      if constexpr (kNorm) {
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) parts[row][threadIdx.x / 32] = squares;
      }
    }
    __syncthreads();
    if (!kNorm || threadIdx.x >= kRows) return;
    float squares = 0;
    for (const float part : parts[threadIdx.x]) squares += part;
    inverse_rms[threadIdx.x] = rsqrtf(squares / static_cast<float>(p.columns) + p.norm_eps);
  }
};

// Loads of one or two rows of W (swiglu), kUnroll steps ahead.
template <typename T, int kParts, int kUnroll>
struct WeightStream {
  const T* rows[kParts];
  int columns;
  uint4 ahead[kParts][kUnroll];

  __device__ void load(int u, int column) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ahead[part][u] = column < columns ? load_once(rows[part] + column) : uint4{0, 0, 0, 0};
    }
  }
};

template <typename T>
__device__ float dot(uint4 a, uint4 b, float sum) {
  const auto* a_pairs = reinterpret_cast<const std::uint32_t*>(&a);
  const auto* b_pairs = reinterpret_cast<const std::uint32_t*>(&b);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(a_pairs[i]);
    const float2 y = unpack<T>(b_pairs[i]);
    sum += x.x * y.x;
    sum += x.y * y.y;
  }
  return sum;
}

template <typename T, typename Out, int kRows, bool kNorm, bool kSwiGlu>
__global__ void __launch_bounds__(kThreads, kRows <= 2 ? 2 : 1) gemv_kernel(const GemvParams<T> p) {
  constexpr int kParts = kSwiGlu ? 2 : 1;
  constexpr int kUnroll = 4 / kParts;
  extern __shared__ __align__(16) std::byte shared[];
  __shared__ float inverse_rms[kRows];
  allow_next_kernel();
  const int lane = threadIdx.x % 32;
  const int out_columns = p.num_features / kParts;
  const int feature = blockIdx.x * kWarps + threadIdx.x / 32;
  const int row = min(feature, out_columns - 1);  // what is made past the end is not stored
  const int stride = (p.columns + kStep - 1) / kStep * kStep;

  WeightStream<T, kParts, kUnroll> weight;
  weight.columns = p.columns;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    weight.rows[part] = p.weight + static_cast<std::size_t>(row + part * out_columns) * p.columns;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) weight.load(u, u * kStep + 8 * lane);

  wait_for_earlier_kernels();
  StagedRows<T, kRows, kNorm> x{reinterpret_cast<T*>(shared), stride, inverse_rms};
  x.stage(p);
  float sums[kParts][kRows] = {};
  for (int begin = 0; begin < stride; begin += kUnroll * kStep) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = begin + u * kStep + 8 * lane;
      if (begin + u * kStep < stride) {
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          const uint4 values = *reinterpret_cast<const uint4*>(x.values + n * stride + column);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            sums[part][n] = dot<T>(weight.ahead[part][u], values, sums[part][n]);
          }
        }
      }
      weight.load(u, column + kUnroll * kStep);
    }
  }
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) sums[part][n] = warp_sum(sums[part][n]);
  }
  if constexpr (kNorm) __syncthreads();  // inverse_rms
  if (lane != 0 || feature >= out_columns) return;
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    if (n >= p.rows) return;
    const float scale = kNorm ? inverse_rms[n] : 1.0F;
    float value = sums[0][n] * scale;
    if (p.bias != nullptr) value += p.bias[feature];
    const std::size_t at = static_cast<std::size_t>(n) * out_columns + feature;
    if constexpr (kSwiGlu) {
      float up = sums[1][n] * scale;
      if (p.bias != nullptr) up += p.bias[out_columns + feature];
      value = silu(value) * up;
    } else if (p.residual != nullptr) {
      value += to_float(p.residual[at]);
    }
    static_cast<Out*>(p.out)[at] = from_float<Out>(value);
  }
}

template <typename T, int kRows>
void run(const LinearArgs& args, CudaStream& stream) {
  const auto& weight = static_cast<const CudaWeight&>(*args.weight);
  const GemvParams<T> params{static_cast<const T*>(args.x),
                             weight.memory.as<T>(),
                             args.bias,
                             args.norm.weight,
                             args.norm.eps,
                             static_cast<const T*>(args.residual),
                             args.out,
                             args.rows,
                             weight.rows,
                             weight.columns};
  const bool swiglu = args.swiglu.scratch != nullptr;
  const bool norm = args.norm.weight != nullptr;
  FT_CHECK(!(swiglu && args.out_fp32));
  const int features = swiglu ? weight.rows / 2 : weight.rows;
  const int stride = (weight.columns + kStep - 1) / kStep * kStep;
  const auto start = [&](auto kernel) {
    const int shared_bytes = kRows * stride * static_cast<int>(sizeof(T));
    FT_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    launch_overlapped(kernel, (features + kWarps - 1) / kWarps, kThreads, shared_bytes, stream,
                      params);
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
  constexpr std::size_t kMaxSharedBytes = 200 << 10;
  const auto columns = static_cast<std::size_t>(args.weight->columns);
  return args.rows <= kMaxGemvRows && columns % 8 == 0 &&
         2 * kMaxGemvRows * (columns + kStep) <= kMaxSharedBytes;
}

void gemv(const LinearArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(can_gemv(args), args.rows, args.weight->columns);
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.rows == 1) return run<T, 1>(args, stream);
    run<T, 2>(args, stream);
  });
}

}  // namespace foretoken::kernels::cuda
