// multiply_few_rows: out = x W^T for 3 to 8 rows of x, bound by reading W once, on tensor cores.
//
// A CTA an SM makes 16 features at a time (swiglu: 16 gates and their ups), its 8 warps each a part
// of the columns: that shares out even the products of few features evenly. A warp's unit of work
// is a panel, 16 features x 256 columns of W with x's part beside it; panels are read row by row,
// 512 neighbouring bytes a load, into a ring in shared memory, over the ends of features too. W is
// the left operand, so that its 16 features are the 16 rows and x's rows the 8 columns; the inner
// order is free (mma.cuh), so a lane takes 8 neighbours of a row at once.
#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/product_out.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kFeatures = 16;
constexpr int kRows = kMaxFewRows;
constexpr int kColumns = 256;         // of a panel: 32 lanes' loads
constexpr int kUnits = kColumns / 8;  // of 16 bytes, in a panel's row
constexpr int kSlots = 2;             // panels of a warp under way

struct Panel {
  uint4 w[kFeatures][kUnits];
  uint4 x[kRows][kUnits];
};

template <int kParts>
struct SharedMemory {
  Panel ring[kWarps][kSlots];
  float sums[2][kWarps][kParts][kRows][kFeatures];  // of two tiles in turn
};
static_assert(sizeof(SharedMemory<1>) > (114 << 10), "two CTAs would fit an SM");

template <typename T>
struct Params {
  const T* x;
  const T* weight;
  ProductOut<T> out;
  int rows;
  int columns;
};

// Where a unit of a row lies, so that lanes that read two neighbouring rows at once meet no bank
// twice.
__device__ inline int place_of(int row, int unit) { return unit ^ (row % 2 * 4); }

// A warp's panels, one after the other: of each tile its columns', and of those each part's.
template <typename T, int kParts>
class Panels {
 public:
  __device__ Panels(const Params<T>& p, Panel* ring)
      : p_(p),
        ring_(ring),
        lane_(static_cast<int>(threadIdx.x) % 32),
        tile_(static_cast<int>(blockIdx.x)),
        first_(static_cast<int>(threadIdx.x) / 32 * kColumns),
        column_(first_) {
    if (first_ >= p.columns) tile_ = tiles();  // more warps than panels of a row
  }

  __device__ int tiles() const { return (p_.out.columns + kFeatures - 1) / kFeatures; }

  // Start the next panel's loads; past the last one there are none.
  __device__ void load_weights(int slot) {
    if (tile_ >= tiles()) return;
    const int column = column_ + 8 * lane_;
#pragma unroll
    for (int row = 0; row < kFeatures; ++row) {
      const int feature = tile_ * kFeatures + row;
      const bool valid = column < p_.columns && feature < p_.out.columns;
      const std::size_t at = static_cast<std::size_t>(part_ * p_.out.columns + feature);
      copy_async(&ring_[slot].w[row][place_of(row, lane_)],
                 valid ? p_.weight + at * p_.columns + column : p_.weight, valid);
    }
  }
  __device__ void load_x(int slot) {
    if (tile_ >= tiles()) return;
    const int column = column_ + 8 * lane_;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool valid = column < p_.columns && row < p_.rows;
      const std::size_t at = static_cast<std::size_t>(row) * p_.columns + column;
      copy_async(&ring_[slot].x[row][place_of(row, lane_)], valid ? p_.x + at : p_.x, valid);
    }
  }
  // Goes on to the panel after that.
  __device__ void next() {
    if (++part_ < kParts) return;
    part_ = 0;
    column_ += kWarps * kColumns;
    if (column_ < p_.columns) return;
    column_ = first_;
    tile_ += static_cast<int>(gridDim.x);
  }
  // Panels of a tile.
  __device__ int count() const {
    const int columns = p_.columns - first_;
    constexpr int kStride = kWarps * kColumns;
    return columns <= 0 ? 0 : (columns + kStride - 1) / kStride * kParts;
  }

 private:
  const Params<T>& p_;
  Panel* ring_;
  int lane_;
  int tile_;
  int first_;
  int column_;
  int part_ = 0;
};

template <typename T>
__device__ void multiply(const Panel& panel, float (&sums)[4]) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kUnits / 4; ++i) {
    const int place = place_of(g, 4 * i + q);
    const uint4 upper = panel.w[g][place];
    const uint4 lower = panel.w[g + 8][place];
    const uint4 x = panel.x[g][place];
    mma<T>(sums, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
    mma<T>(sums, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
  }
}

template <typename T, typename Out, int kParts>
__global__ void __launch_bounds__(kThreads, 1) few_rows_kernel(const Params<T> p) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SharedMemory<kParts>*>(memory);
  allow_next_kernel();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int q = static_cast<int>(threadIdx.x) % 4;
  // Weights are read before the kernels that make x have ended.
  Panels<T, kParts> weights(p, shared.ring[warp]);
  Panels<T, kParts> loads(p, shared.ring[warp]);
  for (int slot = 0; slot < kSlots; ++slot) {
    weights.load_weights(slot);
    weights.next();
  }
  wait_for_earlier_kernels();
  for (int slot = 0; slot < kSlots; ++slot) {
    loads.load_x(slot);
    loads.next();
    commit_copies();
  }

  const int panels = loads.count();
  int slot = 0;
  int turn = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < loads.tiles();
       tile += static_cast<int>(gridDim.x)) {
    float sums[kParts][4] = {};
    for (int i = 0; i < panels; i += kParts) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        wait_copies<kSlots - 1>();
        __syncwarp();  // other lanes' loads of the panel
        multiply<T>(shared.ring[warp][slot], sums[part]);
        __syncwarp();  // all have read it
        loads.load_weights(slot);
        loads.load_x(slot);
        loads.next();
        commit_copies();
        slot = slot + 1 == kSlots ? 0 : slot + 1;
      }
    }
    auto& all = shared.sums[turn];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all[warp][part][2 * q + i % 2][g + i / 2 * 8] = sums[part][i];
      }
    }
    __syncthreads();
    const int feature = static_cast<int>(threadIdx.x) % kFeatures;
    const int row = static_cast<int>(threadIdx.x) / kFeatures;
    if (row < p.rows && tile * kFeatures + feature < p.out.columns) {
      float total[kParts] = {};
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) total[part] += all[w][part][row][feature];
      }
      store_product<Out, kParts>(p.out, row, tile * kFeatures + feature, total);
    }
    turn ^= 1;  // who comes back to these has seen everyone past the next barrier
  }
}

}  // namespace

bool can_multiply_few_rows(const LinearArgs& args) {
  return args.rows <= kMaxFewRows && args.weight->columns % 8 == 0;
}

void multiply_few_rows(const LinearArgs& args, const void* x, DataType activation,
                       CudaStream& stream) {
  FT_CHECK(can_multiply_few_rows(args), args.rows, args.weight->columns);
  const auto& weight = static_cast<const CudaWeight&>(*args.weight);
  const bool swiglu = args.swiglu.scratch != nullptr;
  FT_CHECK(!(swiglu && args.out_fp32));
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int out_columns = swiglu ? weight.rows / 2 : weight.rows;
    const Params<T> params{static_cast<const T*>(x),
                           weight.memory.as<T>(),
                           {args.bias, static_cast<const T*>(args.residual), args.out, out_columns},
                           args.rows,
                           weight.columns};
    static const int sms = num_sms();
    const int ctas = std::min(sms, (out_columns + kFeatures - 1) / kFeatures);
    const auto start = [&](auto kernel, std::size_t bytes) {
      FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
      launch_overlapped(kernel, ctas, kThreads, bytes, stream, params);
    };
    if (swiglu) return start(few_rows_kernel<T, T, 2>, sizeof(SharedMemory<2>));
    args.out_fp32 ? start(few_rows_kernel<T, float, 1>, sizeof(SharedMemory<1>))
                  : start(few_rows_kernel<T, T, 1>, sizeof(SharedMemory<1>));
  });
}

}  // namespace foretoken::kernels::cuda
