// The predictor on the GPU: the CNN's scores of every map, streamed from step to step, then the
// choice (best_blocks.cu). docs/predictor.md derives the streaming evaluation.
//
// Plain: a thread evaluates a column, in fp32.
#include <cmath>

#include "common/check.h"
#include "kernels/cuda/best_blocks.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/map_state.cuh"
#include "kernels/cuda/ops.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLastRow = kHistoryRows - 1;
constexpr int kFixedBits = 22;
constexpr float kInterior = 8.0F;   // |s| is cut off here: 60 rows fit int32
constexpr float kBoundary = 64.0F;  // and here: 4 rows fit

class CudaPredictor final : public Predictor {
 public:
  explicit CudaPredictor(const PredictorWeights& weights) {
    FT_CUDA(cudaMalloc(reinterpret_cast<void**>(&weights_), sizeof weights));
    FT_CUDA(cudaMemcpy(weights_, &weights, sizeof weights, cudaMemcpyHostToDevice));
  }
  ~CudaPredictor() override { cudaFree(weights_); }
  CudaPredictor(const CudaPredictor&) = delete;
  CudaPredictor& operator=(const CudaPredictor&) = delete;
  const PredictorWeights* weights() const { return weights_; }

 private:
  PredictorWeights* weights_ = nullptr;
};

// The window of a map: row i is history row num_rows - 64 + i.
template <typename T>
struct Window {
  const Map& map;
  std::int64_t newest;  // num_rows - 1
  int columns;

  // 0 outside the candidates, before the first row, and for what is no probability.
  __device__ float value(int row, int column, bool* good) const {
    const std::int64_t r = newest - kLastRow + row;
    if (r < 0 || column < 0 || column >= columns) return 0;
    const float v = to_float(map.row<T>(r)[column]);
    if (v >= 0 && v <= 2) return v;
    *good = false;
    return 0;
  }
};

// s of a window row; rows [first, 63] are in the window.
template <typename T>
__device__ __noinline__ float evaluate(const PredictorWeights& w, const Window<T>& window, int row,
                                       int column, int first) {
  float hidden[3][3][16];
  bool good = true;
  for (int y = 0; y < 3; ++y) {
    for (int x = 0; x < 3; ++x) {
      const int r = row + y - 1;
      const int c = column + x - 1;
      const bool inside = r >= first && r <= kLastRow && c >= 0 && c < window.columns;
      float patch[9];
      for (int k = 0; k < 9; ++k) {
        const int from = r + k / 3 - 1;
        const bool seen = inside && from >= first && from <= kLastRow;
        patch[k] = seen ? window.value(from, c + k % 3 - 1, &good) : 0;
      }
      for (int i = 0; i < 16; ++i) {
        float sum = w.conv1_bias[i];
        for (int k = 0; k < 9; ++k) sum = fmaf(w.conv1_weight[i * 9 + k], patch[k], sum);
        hidden[y][x][i] = inside ? fmaxf(sum, 0) : 0;
      }
    }
  }
  float s = 0;
  for (int o = 0; o < 32; ++o) {
    float sum = w.conv2_bias[o];
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 9; ++k) {
        sum = fmaf(w.conv2_weight[(o * 16 + i) * 9 + k], hidden[k / 3][k % 3][i], sum);
      }
    }
    s = fmaf(w.conv3_weight[o], fmaxf(sum, 0), s);
  }
  return s;
}

__device__ std::int32_t fixed(float s, float saturation) {
  const float bounded = fminf(fmaxf(s, -saturation), saturation);
  return __float2int_rn(bounded * static_cast<float>(1 << kFixedBits));
}

template <typename T>
__device__ void check_rows(const Map& map, const Window<T>& window, int first_row) {
  bool good = true;
  for (int row = first_row; row <= kLastRow; ++row) {
    good = true;
    for (int c = static_cast<int>(threadIdx.x); c < window.columns; c += kThreads) {
      window.value(row, c, &good);
    }
    if (!good) {
      const auto until = window.newest - kLastRow + row + kHistoryRows + 1;
      atomicMax(reinterpret_cast<long long*>(&map.header().clean_from),
                static_cast<long long>(until));
    }
  }
}

template <typename T>
__device__ void update_map(const PredictorWeights& w, const Map& map) {
  const std::int64_t num_rows = map.num_rows();
  const MapHeader before = map.header();
  const Window<T> window{map, num_rows - 1, map.candidates()};
  const bool known = before.num_rows > 0 && before.columns <= window.columns;
  const bool slide = known && before.num_rows + 1 == num_rows;
  const bool keep = slide || (known && before.num_rows == num_rows);
  int first_rebuilt = keep ? window.columns : 0;
  if (keep && before.columns < window.columns) first_rebuilt = max(0, before.columns - 2) / 4 * 4;
  check_rows(map, window, first_rebuilt < window.columns ? 0 : kLastRow);
  for (int c = static_cast<int>(threadIdx.x); c < window.columns; c += kThreads) {
    std::int32_t sum = c < first_rebuilt ? map.sums()[c] : 0;
    if (c < first_rebuilt && slide) {
      sum += fixed(evaluate(w, window, 61, c, 0), kInterior) -
             fixed(evaluate(w, window, 1, c, -1), kInterior);
    }
    for (int row = 2; c >= first_rebuilt && row <= 61; ++row) {
      sum += fixed(evaluate(w, window, row, c, 0), kInterior);
    }
    map.sums()[c] = sum;
    std::int32_t edge = 0;
    for (const int row : {0, 1, 62, 63}) edge += fixed(evaluate(w, window, row, c, 0), kBoundary);
    map.boundary()[c] = edge;
  }
}

__global__ void __launch_bounds__(kThreads)
    update_kernel(const PredictorWeights* weights, const HistoryState* states, int rows) {
  __shared__ PredictorWeights w;
  __shared__ int first_item[kMaxSequences + 1];
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof w / 4); i += kThreads) {
    reinterpret_cast<float*>(&w)[i] = reinterpret_cast<const float*>(weights)[i];
  }
  number_items(
      rows, [&](int i) { return states[i].num_layers * num_maps(states[i]); }, first_item);
  int sequence = 0;
  for (int item = static_cast<int>(blockIdx.x); item < first_item[rows];
       item += static_cast<int>(gridDim.x)) {
    while (first_item[sequence + 1] <= item) ++sequence;
    const Map map{states[sequence], item - first_item[sequence]};
    if (!map.is_scored()) continue;
    with_history_type(map.state.type,
                      [&](auto tag) { update_map<typename decltype(tag)::type>(w, map); });
  }
}

}  // namespace

std::unique_ptr<Predictor> make_predictor(const PredictorWeights& weights) {
  return std::make_unique<CudaPredictor>(weights);
}

std::size_t predictor_state_bytes(int max_columns) {
  FT_CHECK(max_columns <= kMaxPredictColumns, max_columns);
  return map_state_bytes(max_columns);
}

void predict(const PredictArgs& args, CudaStream& stream) {
  FT_CHECK(args.rows <= kMaxSequences, args.rows);
  if (args.rows == 0) return;
  static const int grid = 8 * num_sms();
  const auto* predictor = static_cast<const CudaPredictor*>(args.predictor);
  update_kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream.handle()>>>(
      predictor->weights(), args.states, args.rows);
  FT_CUDA(cudaGetLastError());
  choose_blocks(args, 0, stream);
}

}  // namespace foretoken::kernels::cuda
