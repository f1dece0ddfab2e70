// Attention rows into the rings of the attention history.
//
// A thread makes 8 columns of a map's row, or of all its rows where a row may hold values of the
// one before. Where block maxima are by slot, a CTA first notes the slots of its columns' blocks.
// A decode step's rows that hold nothing are nearly all zero: a CTA a KV head clears them and then
// writes what its slots have, which takes few loads in a row, beside products that keep memory
// busy.
#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/history_value.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/predict_limits.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSlotThreads = 256;                  // of a KV head, where its slots are written
constexpr int kColumns = 8;                        // of a thread
constexpr int kSpanColumns = kThreads * kColumns;  // of a CTA at a time
constexpr int kMaxSpans = 8;                       // CTAs of a row; they go on with further spans
constexpr int kMapCtas = 8;        // of a layer's maps or KV heads; they go on likewise
constexpr float kNoValue = -1.0F;  // a probability never is: marks a block that was not attended

// A map of one sequence and layer, and the rows that a CTA makes.
struct Job {
  const HistoryAppendArgs& args;
  const HistoryState& state;
  int layer;  // of the args': args.layer + this
  int sequence;
  int map;
  int heads_per_map;
  int first_row;
  int end_row;
};

// places[i] = where column first + i stands among the block maxima, or kAbsent.
__device__ void find_columns(const Job& job, int first, std::int32_t* places) {
  const HistoryAppendArgs& args = job.args;
  const int columns = args.num_columns[job.sequence];
  for (int i = static_cast<int>(threadIdx.x); i < kSpanColumns; i += kThreads) {
    places[i] = args.block_max != nullptr && first + i < columns ? first + i : kAbsent;
  }
  if (args.block_max != nullptr) return;
  __syncthreads();
  const SequenceKv& kv = args.sequences[job.sequence];
  const std::int32_t* blocks =
      slot_to_block(kv, args.layer + job.layer, job.map / job.state.maps_per_kv_head);
  for (int slot = static_cast<int>(threadIdx.x); slot < kv.num_slots; slot += kThreads) {
    const int i = blocks[slot] - first;
    if (i >= 0 && i < kSpanColumns && blocks[slot] < columns) places[i] = slot;
  }
}

// at: of the head and row, in lse.
__device__ const float* maxima_of(const Job& job, int head, std::ptrdiff_t at) {
  const HistoryAppendArgs& args = job.args;
  if (args.block_max != nullptr) return args.block_max + at * args.pitch;
  return block_max_of(args.sequences[job.sequence], args.layer + job.layer, args.num_heads, head);
}

// Mean over the map's heads of exp(block_max - lse), or kNoValue.
__device__ void row_values(const Job& job, int row, const std::int32_t (&places)[kColumns],
                           float (&values)[kColumns]) {
  const HistoryAppendArgs& args = job.args;
  const float share = 1.0F / static_cast<float>(job.heads_per_map);
#pragma unroll
  for (float& value : values) value = kNoValue;
  for (int h = 0; h < job.heads_per_map; ++h) {
    const int head = job.map * job.heads_per_map + h;
    const auto sequence =
        static_cast<std::ptrdiff_t>(job.layer) * args.num_sequences + job.sequence;
    const auto at = (sequence * args.num_heads + head) * args.rows + row;
    const float* maxima = maxima_of(job, head, at);
    const float lse = args.lse[at];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (places[c] == kAbsent) continue;
      const float highest = maxima[places[c]];
      if (highest == -INFINITY) continue;
      values[c] = (values[c] == kNoValue ? 0.0F : values[c]) + share * expf(highest - lse);
    }
  }
}

// Columns beyond a row's own become zeros, so that a later, wider window reads zero there.
template <typename T>
__device__ void append_columns(const Job& job, int first, const std::int32_t (&places)[kColumns]) {
  const HistoryState& state = job.state;
  const int layer = job.args.layer + job.layer;
  const std::int64_t start = state.num_rows[layer];
  const int columns = job.args.num_columns[job.sequence];
  float last[kColumns] = {};
  if (job.args.hold && start > 0) {
    const auto stored = *reinterpret_cast<const Eight<T>*>(
        history_row<T>(state, layer, job.map, start - 1) + first);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) last[c] = to_float(stored.v[c]);
  }
  for (int row = job.first_row; row < job.end_row; ++row) {
    float values[kColumns];
    row_values(job, row, places, values);
    Eight<T> stored;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (values[c] == kNoValue) values[c] = job.args.hold && first + c < columns ? last[c] : 0.0F;
      last[c] = values[c];
      stored.v[c] = from_float<T>(values[c]);
    }
    *reinterpret_cast<Eight<T>*>(history_row<T>(state, layer, job.map, start + row) + first) =
        stored;
  }
}

// A CTA's span of columns, from `first` on. places: [kSpanColumns] shared.
__device__ void append_span(const Job& job, int first, std::int32_t* places) {
  find_columns(job, first, places);
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x) * kColumns;
  std::int32_t mine[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) mine[c] = places[column + c];
  __syncthreads();  // before the next span's are noted
  if (first + column >= job.state.pitch) return;
  with_history_type(job.state.type, [&](auto tag) {
    append_columns<typename decltype(tag)::type>(job, first + column, mine);
  });
}

// The last CTA of a layer to come here counts the rows: the others have read the old count.
__device__ void count_rows(const HistoryAppendArgs& args, int layer, std::uint32_t* arrived) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned ctas =
        gridDim.x * gridDim.y * gridDim.z / static_cast<unsigned>(args.num_layers);
    is_last = atomicInc(arrived + layer, ctas - 1) == ctas - 1;  // and sets it back to zero
  }
  __syncthreads();
  if (!is_last) return;
  for (int s = static_cast<int>(threadIdx.x); s < args.num_sequences;
       s += static_cast<int>(blockDim.x)) {
    args.states[s].num_rows[args.layer + layer] += args.rows;
    args.states[s].num_columns[args.layer + layer] = args.num_columns[s];
  }
}

// Grid: [spans, maps, layers x sequences x parts of the rows].
__global__ void __launch_bounds__(kThreads)
    append_kernel(const HistoryAppendArgs args, int rows_per_cta, std::uint32_t* arrived) {
  __shared__ std::int32_t places[kSpanColumns];
  allow_next_kernel();
  const int parts = args.rows / rows_per_cta;
  const int sequence = static_cast<int>(blockIdx.z) / parts % args.num_sequences;
  const int layer = static_cast<int>(blockIdx.z) / parts / args.num_sequences;
  const HistoryState& state = args.states[sequence];
  const int first_row = static_cast<int>(blockIdx.z) % parts * rows_per_cta;
  const int span = static_cast<int>(blockIdx.x) * kSpanColumns;
  const int stride = static_cast<int>(gridDim.x) * kSpanColumns;
  for (int map = blockIdx.y; map < num_maps(state); map += static_cast<int>(gridDim.y)) {
    const Job job{args,      state,
                  layer,     sequence,
                  map,       args.num_heads / num_maps(state),
                  first_row, first_row + rows_per_cta};
    for (int first = span; first < state.pitch; first += stride) append_span(job, first, places);
  }
  count_rows(args, layer, arrived);
}

// Mean over a map's heads of exp(block_max - lse) at a slot, or kNoValue. maxima: of the slot and
// the first head, the next one's num_slots behind.
__device__ float slot_value(const float* maxima, int num_slots, const float* lse, int heads) {
  float value = kNoValue;
  for (int head = 0; head < heads; ++head) {
    const float highest = maxima[static_cast<std::ptrdiff_t>(head) * num_slots];
    if (highest == -INFINITY) continue;
    value = (value == kNoValue ? 0.0F : value) +
            1.0F / static_cast<float>(heads) * expf(highest - lse[head]);
  }
  return value;
}

template <typename T>
__device__ void append_attended(const HistoryAppendArgs& args, int layer, int sequence,
                                int kv_head) {
  const HistoryState& state = args.states[sequence];
  const SequenceKv& kv = args.sequences[sequence];
  const int maps = state.maps_per_kv_head;
  const int first_map = kv_head * maps;
  const std::int64_t row = state.num_rows[args.layer + layer];
  const auto row_of = [&](int map) {
    return history_row<T>(state, args.layer + layer, first_map + map, row);
  };
  for (int map = 0; map < maps; ++map) {
    auto* to = reinterpret_cast<Eight<T>*>(row_of(map));
    for (int i = static_cast<int>(threadIdx.x); i < state.pitch / kColumns; i += kSlotThreads) {
      to[i] = Eight<T>{};
    }
  }
  __syncthreads();
  const int columns = args.num_columns[sequence];
  const int slots = kv.num_slots;
  const std::int32_t* blocks = slot_to_block(kv, args.layer + layer, kv_head);
  const int heads_per_map = args.num_heads / num_maps(state);
  const int first_head = first_map * heads_per_map;
  const float* maxima = block_max_of(kv, args.layer + layer, args.num_heads, first_head);
  const float* lse =
      args.lse +
      (static_cast<std::ptrdiff_t>(layer) * args.num_sequences + sequence) * args.num_heads +
      first_head;
  for (int i = static_cast<int>(threadIdx.x); i < slots * maps; i += kSlotThreads) {
    const int slot = i % slots;
    const int map = i / slots;
    const int block = blocks[slot];
    const int head = map * heads_per_map;
    const float value = slot_value(maxima + static_cast<std::ptrdiff_t>(head) * slots + slot, slots,
                                   lse + head, heads_per_map);
    if (block == kAbsent || block >= columns || value == kNoValue) continue;
    row_of(map)[block] = from_float<T>(value);
  }
}

// Grid: [parts of the KV heads, sequences, layers]. REQUIRES: by slot, nothing held.
__global__ void __launch_bounds__(kSlotThreads)
    append_attended_kernel(const HistoryAppendArgs args, std::uint32_t* arrived) {
  allow_next_kernel();
  const auto sequence = static_cast<int>(blockIdx.y);
  const auto layer = static_cast<int>(blockIdx.z);
  const HistoryState& state = args.states[sequence];
  for (int kv_head = blockIdx.x; kv_head < state.num_kv_heads;
       kv_head += static_cast<int>(gridDim.x)) {
    with_history_type(state.type, [&](auto tag) {
      append_attended<typename decltype(tag)::type>(args, layer, sequence, kv_head);
    });
  }
  count_rows(args, layer, arrived);
}

}  // namespace

void history_append(const HistoryAppendArgs& args, CudaStream& stream) {
  FT_CHECK(args.rows >= 1 && args.rows <= kHistoryRows, args.rows);
  FT_CHECK(args.block_max != nullptr || args.rows == 1, args.rows);
  if (args.num_sequences == 0 || args.num_layers == 0) return;
  FT_CHECK(args.num_layers <= CudaStream::kNumCounters, args.num_layers);
  if (args.block_max == nullptr && !args.hold) {
    const dim3 grid(static_cast<unsigned>(std::min(kMapCtas, args.num_heads)),
                    static_cast<unsigned>(args.num_sequences),
                    static_cast<unsigned>(args.num_layers));
    append_attended_kernel<<<grid, kSlotThreads, 0, stream.handle()>>>(args, stream.counters());
    FT_CUDA(cudaGetLastError());
    return;
  }
  FT_CHECK(!args.hold || args.num_layers * args.num_sequences <= kMaxHeldRows, args.num_layers,
           args.num_sequences);
  // Rows that hold values wait for the row before; others don't.
  const int rows_per_cta = args.hold ? args.rows : 1;
  const dim3 grid(
      kMaxSpans, static_cast<unsigned>(std::min(kMapCtas, args.num_heads)),
      static_cast<unsigned>(args.num_layers * args.num_sequences * (args.rows / rows_per_cta)));
  append_kernel<<<grid, kThreads, 0, stream.handle()>>>(args, rows_per_cta, stream.counters());
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels::cuda
