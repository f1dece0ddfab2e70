// How near each segment is to being wanted (Selection::segment_scores), when the blocks are chosen:
// one CTA a KV head. HeadChoice::note_segments (kernels/cpu/best_blocks.h) is the reference.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/map_state.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/slot_table.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSegments = kMaxPredictColumns / kSegmentBlocks;
constexpr float kScoreUnit = 1.0F / (1 << kFixedPointBits) / kHistoryRows;

// Of a KV head.
struct Chosen {
  const std::int32_t* blocks;
  int count;
};

struct Shared {
  std::uint32_t chosen[kMaxPredictColumns / 32];  // a bit a candidate
  float lowest[kMaxMaps];                         // score of those; not positive: no say
  float scores[kMaxSegments];
};

__device__ float score_of(const Map& map, int column, float bias) {
  return bias + static_cast<float>(map.scores()[column]) * kScoreUnit;
}

// Of the chosen blocks, by one warp. 0 where the map's scores are not to be trusted.
__device__ float lowest_of(const Map& map, const Chosen& chosen, float bias) {
  if (!map.is_clean()) return 0;
  float lowest = std::numeric_limits<float>::max();
  for (int i = lane_id(); i < chosen.count; i += 32) {
    lowest = fminf(lowest, score_of(map, chosen.blocks[i] - kSinkColumns, bias));
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    lowest = fminf(lowest, __shfl_xor_sync(~0U, lowest, offset));
  }
  return lowest;
}

// By all threads of the CTA.
__device__ void note_chosen(const HistoryState& state, int first_map, int candidates,
                            const Chosen& chosen, float bias, Shared& shared) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int w = tid; w < (candidates + 31) / 32; w += kThreads) shared.chosen[w] = 0;
  __syncthreads();
  for (int i = tid; i < chosen.count; i += kThreads) {
    const int column = chosen.blocks[i] - kSinkColumns;
    atomicOr(&shared.chosen[column / 32], 1U << (column % 32));
  }
  for (int m = tid / 32; m < state.maps_per_kv_head; m += kWarps) {
    const float lowest = lowest_of({state, first_map + m}, chosen, bias);
    if (lane_id() == 0) shared.lowest[m] = lowest;
  }
  __syncthreads();
}

// Over the maps, its highest score by the lowest chosen one.
__device__ float nearness(const HistoryState& state, int first_map, int column, float bias,
                          const Shared& shared) {
  if ((shared.chosen[column / 32] >> (column % 32) & 1) != 0) return 0;
  float most = 0;
  for (int m = 0; m < state.maps_per_kv_head; ++m) {
    const float lowest = shared.lowest[m];
    if (lowest <= 0) continue;
    most = fmaxf(most, score_of({state, first_map + m}, column, bias) / lowest);
  }
  return most;
}

// A thread a block: a segment's lie side by side in half a warp.
__device__ void score_head(const HistoryState& state, const Selection& selection, int kv_head,
                           float bias, Shared& shared) {
  const int tid = static_cast<int>(threadIdx.x);
  const int first_map = kv_head * state.maps_per_kv_head;
  const Map map{state, first_map};
  const bool scored = is_scored(state, map.layer());
  const int candidates = scored ? map.candidates() : 0;
  if (scored) {
    const Chosen chosen{
        selection.blocks + static_cast<std::ptrdiff_t>(kv_head) * selection.max_selected,
        selection.counts[kv_head]};
    note_chosen(state, first_map, candidates, chosen, bias, shared);
  }
  for (int first = 0; first < selection.max_segments * kSegmentBlocks; first += kThreads) {
    const int column = first + tid - kSinkColumns;
    const bool counts = column >= 0 && column < candidates;
    float most = counts ? nearness(state, first_map, column, bias, shared) : 0;
    for (int offset = kSegmentBlocks / 2; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(~0U, most, offset));
    }
    const int segment = (first + tid) / kSegmentBlocks;
    if (tid % kSegmentBlocks == 0 && segment < selection.max_segments) {
      shared.scores[segment] = most;
    }
  }
  __syncthreads();
  // To the host's memory in whole lines, each score once: it may be looked at meanwhile.
  float* out =
      selection.segment_scores + static_cast<std::ptrdiff_t>(kv_head) * selection.max_segments;
  for (int i = tid; i < selection.max_segments; i += kThreads) out[i] = shared.scores[i];
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    score_segments_kernel(const HistoryState* states, const Selection* selections, float bias) {
  __shared__ Shared shared;
  const HistoryState& state = states[blockIdx.y];
  const Selection& selection = selections[blockIdx.y];
  if (selection.segment_scores == nullptr) return;
  require(selection.max_segments <= kMaxSegments && state.maps_per_kv_head <= kMaxMaps);
  const int heads = state.num_layers * state.num_kv_heads;
  for (int head = static_cast<int>(blockIdx.x); head < heads; head += static_cast<int>(gridDim.x)) {
    score_head(state, selection, head, bias, shared);
  }
}

}  // namespace

void score_segments(const PredictArgs& args, CudaStream& stream) {
  if (args.rows == 0) return;
  static const auto sms = static_cast<unsigned>(num_sms());
  const dim3 grid(sms, static_cast<unsigned>(args.rows));
  score_segments_kernel<<<grid, kThreads, 0, stream.handle()>>>(args.states, args.selections,
                                                                bias_of(*args.predictor));
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels::cuda
