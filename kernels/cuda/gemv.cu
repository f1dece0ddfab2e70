// gemv: out = x W^T for up to 8 rows of x, bound by reading W once from device memory.
//
// A block of threads makes 16 features (swiglu: 8 gates and their 8 ups) of all rows. Its 8 warps
// split the columns, 128 at a time each, so that 1 KiB of every W row is in flight; partial sums
// meet in shared memory. W is the tensor cores' left operand and x the right one: 16 bytes of a W
// row and of an x row are two steps' places (mma.cuh), straight from memory into registers. The
// first W loads are issued before the kernel waits for x.
//
// The RMS norm is folded in: sum_k w[k] x[k] W[n, k], times 1 / rms(x) at the end, which the warps
// find beside the product.
#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kFeatures = 16;  // rows of W a block of threads
constexpr int kUnroll = 4;     // steps of kGemvColumns (a warp's 16-byte loads) in flight

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

// The W row of tile row i (0..15) of a block: with swiglu the upper 8 are the ups of the lower.
template <bool kSwiGlu>
__device__ int feature_of(int i, int num_features) {
  if constexpr (kSwiGlu) {
    const int gate = blockIdx.x * 8 + i % 8;
    return i < 8 ? gate : num_features / 2 + gate;
  }
  return blockIdx.x * kFeatures + i;
}

template <typename T>
struct WeightTile {
  uint4 low[kUnroll];   // tile row g
  uint4 high[kUnroll];  // tile row g + 8

  __device__ void load(const T* low_row, const T* high_row, int step, int num_steps) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (step + u < num_steps) {
        low[u] = load_once(low_row + (step + u) * kGemvColumns);
        high[u] = load_once(high_row + (step + u) * kGemvColumns);
      } else {
        low[u] = high[u] = uint4{0, 0, 0, 0};
      }
    }
  }
};

// 8 values of x under the norm's weights; adds their squares.
template <typename T>
__device__ uint4 apply_norm(uint4 x, const float* weight, float& squares) {
  const auto* pairs = reinterpret_cast<const std::uint32_t*>(&x);
  const float4 first = *reinterpret_cast<const float4*>(weight);
  const float4 second = *reinterpret_cast<const float4*>(weight + 4);
  const float2 a = unpack<T>(pairs[0]);
  const float2 b = unpack<T>(pairs[1]);
  const float2 c = unpack<T>(pairs[2]);
  const float2 d = unpack<T>(pairs[3]);
  squares +=
      a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y + c.x * c.x + c.y * c.y + d.x * d.x + d.y * d.y;
  return {pack<T>(a.x * first.x, a.y * first.y), pack<T>(b.x * first.z, b.y * first.w),
          pack<T>(c.x * second.x, c.y * second.y), pack<T>(d.x * second.z, d.y * second.w)};
}

template <typename T, bool kNorm>
__device__ void multiply(const WeightTile<T>& tile, const T* x_row, const float* norm_weight,
                         int step, int num_steps, float (&sums)[4], float& squares) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    uint4 x{0, 0, 0, 0};
    if (x_row != nullptr && step + u < num_steps) {
      const int column = (step + u) * kGemvColumns;
      x = *reinterpret_cast<const uint4*>(x_row + column);
      if constexpr (kNorm) x = apply_norm<T>(x, norm_weight + column, squares);
    }
    mma<T>(sums, tile.low[u].x, tile.high[u].x, tile.low[u].y, tile.high[u].y, x.x, x.y);
    mma<T>(sums, tile.low[u].z, tile.high[u].z, tile.low[u].w, tile.high[u].w, x.z, x.w);
  }
}

struct PartialSums {
  float products[kWarps][kFeatures][8];  // [warp, tile row, x row]
  float squares[kWarps][8];              // [warp, x row]
};

// The product of tile row i and x row n, all warps together, normed.
template <bool kNorm>
__device__ float total(const PartialSums& partial, int i, int n, float eps, int columns) {
  float sum = 0;
  float squares = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum += partial.products[warp][i][n];
    if constexpr (kNorm) squares += partial.squares[warp][n];
  }
  if constexpr (kNorm) sum *= rsqrtf(squares / static_cast<float>(columns) + eps);
  return sum;
}

template <typename T, typename Out, bool kNorm, bool kSwiGlu>
__global__ void __launch_bounds__(32 * kWarps) gemv_kernel(const GemvParams<T> p) {
  __shared__ PartialSums partial;
  allow_next_kernel();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  const int num_steps = p.columns / kGemvColumns;
  // A last tile past the end reads the last row again; what it makes is not stored.
  const int low = min(feature_of<kSwiGlu>(g, p.num_features), p.num_features - 1);
  const int high = min(feature_of<kSwiGlu>(g + 8, p.num_features), p.num_features - 1);
  const T* low_row = p.weight + static_cast<std::size_t>(low) * p.columns + 8 * q;
  const T* high_row = p.weight + static_cast<std::size_t>(high) * p.columns + 8 * q;

  int step = warp * kUnroll;
  WeightTile<T> tile;
  tile.load(low_row, high_row, step, num_steps);
  wait_for_earlier_kernels();
  const T* x_row = g < p.rows ? p.x + static_cast<std::size_t>(g) * p.columns + 8 * q : nullptr;
  const float* norm_weight = kNorm ? p.norm_weight + 8 * q : nullptr;
  float sums[4] = {};
  float squares = 0;
  while (step < num_steps) {
    multiply<T, kNorm>(tile, x_row, norm_weight, step, num_steps, sums, squares);
    step += kWarps * kUnroll;
    if (step < num_steps) tile.load(low_row, high_row, step, num_steps);
  }

  partial.products[warp][g][2 * q] = sums[0];
  partial.products[warp][g][2 * q + 1] = sums[1];
  partial.products[warp][g + 8][2 * q] = sums[2];
  partial.products[warp][g + 8][2 * q + 1] = sums[3];
  if constexpr (kNorm) {
    squares += __shfl_xor_sync(~0U, squares, 1);
    squares += __shfl_xor_sync(~0U, squares, 2);
    if (q == 0) partial.squares[warp][g] = squares;
  }
  __syncthreads();

  const int width = kSwiGlu ? 8 : kFeatures;  // features that this block stores
  const int n = threadIdx.x / width;
  const int i = threadIdx.x % width;
  if (n >= p.rows) return;
  const int feature = feature_of<kSwiGlu>(i, p.num_features);
  const int out_columns = kSwiGlu ? p.num_features / 2 : p.num_features;
  if (feature >= out_columns) return;
  float value = total<kNorm>(partial, i, n, p.norm_eps, p.columns);
  if (p.bias != nullptr) value += p.bias[feature];
  const std::size_t at = static_cast<std::size_t>(n) * out_columns + feature;
  if constexpr (kSwiGlu) {
    float up = total<kNorm>(partial, i + 8, n, p.norm_eps, p.columns);
    if (p.bias != nullptr) up += p.bias[out_columns + feature];
    value = silu(value) * up;
  } else {
    if (p.residual != nullptr) value += to_float(p.residual[at]);
  }
  static_cast<Out*>(p.out)[at] = from_float<Out>(value);
}

template <typename T>
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
  const int tile = swiglu ? 8 : kFeatures;
  const int blocks = ((swiglu ? weight.rows / 2 : weight.rows) + tile - 1) / tile;
  const auto start = [&](auto kernel) {
    launch_overlapped(kernel, blocks, 32 * kWarps, 0, stream, params);
  };
  const bool norm = args.norm.weight != nullptr;
  FT_CHECK(!(swiglu && args.out_fp32));
  if (swiglu)
    return norm ? start(gemv_kernel<T, T, true, true>) : start(gemv_kernel<T, T, false, true>);
  if (args.out_fp32) {
    return norm ? start(gemv_kernel<T, float, true, false>)
                : start(gemv_kernel<T, float, false, false>);
  }
  norm ? start(gemv_kernel<T, T, true, false>) : start(gemv_kernel<T, T, false, false>);
}

}  // namespace

void gemv(const LinearArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.rows <= kMaxGemvRows && args.weight->columns % kGemvColumns == 0, args.rows,
           args.weight->columns);
  with_half_type(activation, [&](auto tag) { run<typename decltype(tag)::type>(args, stream); });
}

}  // namespace foretoken::kernels::cuda
