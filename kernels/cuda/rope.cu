// rope_prefill and rope_decode: qkv -> q, and k and v into the prefill scratch or the open block.
// One warp a (row, head): a lane owns the pairs (i, i + head_dim / 2) that rotate together.
#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kWarps = 8;  // heads a block of threads

// Where a row's k and v of a head go, and its position.
template <typename T>
struct ScratchTarget {
  T* k;
  T* v;
  int begin;
  int scratch_tokens;
  int head_dim;

  __device__ int position(int row) const { return begin + row; }
  __device__ std::size_t at(int row, int head) const {
    return (static_cast<std::size_t>(head) * scratch_tokens + begin + row) * head_dim;
  }
  __device__ T* k_row(int row, int head) const { return k + at(row, head); }
  __device__ T* v_row(int row, int head) const { return v + at(row, head); }
};

template <typename T>
struct OpenBlockTarget {
  const SequenceKv* sequences;
  int layer;
  int head_dim;

  __device__ int position(int row) const { return *sequences[row].length; }
  __device__ T* k_row(int row, int head) const {
    const SequenceKv& kv = sequences[row];
    const int length = *kv.length;
    const int slot = block_to_slot(kv, layer, head)[length / kBlockTokens];
    require(slot != kAbsent);
    return reinterpret_cast<T*>(kv.slots + slot_offset(kv, layer, head, slot)) +
           length % kBlockTokens * head_dim;
  }
  __device__ T* v_row(int row, int head) const {
    return k_row(row, head) + kBlockTokens * head_dim;
  }
};

template <typename T>
struct RopeInput {
  const T* qkv;
  const float* q_norm;
  const float* k_norm;
  float norm_eps;
  const float* inv_freq;
  float scale;
  int num_heads;
  int num_kv_heads;
  T* q_out;
};

// A head of a row, by one warp.
template <typename T, int kHeadDim, typename Target>
__device__ void rotate(const RopeInput<T>& in, const Target& target, int row, int head,
                       const float* cosine, const float* sine) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kPairs = kHalf / 32;  // of a lane
  const int lane = threadIdx.x % 32;
  const int num_all = in.num_heads + 2 * in.num_kv_heads;
  const T* x = in.qkv + (static_cast<std::size_t>(row) * num_all + head) * kHeadDim;
  float low[kPairs];
  float high[kPairs];
  for (int j = 0; j < kPairs; ++j) {
    low[j] = to_float(x[lane * kPairs + j]);
    high[j] = to_float(x[kHalf + lane * kPairs + j]);
  }
  const bool is_q = head < in.num_heads;
  const bool is_v = head >= in.num_heads + in.num_kv_heads;
  const float* norm = is_q ? in.q_norm : in.k_norm;
  if (!is_v && norm != nullptr) {
    float squares = 0;
    for (int j = 0; j < kPairs; ++j) squares += low[j] * low[j] + high[j] * high[j];
    const float inverse = rsqrtf(warp_sum(squares) / kHeadDim + in.norm_eps);
    for (int j = 0; j < kPairs; ++j) {
      low[j] *= inverse * norm[lane * kPairs + j];
      high[j] *= inverse * norm[kHalf + lane * kPairs + j];
    }
  }
  T* out = nullptr;
  if (is_q) {
    out = in.q_out + (static_cast<std::size_t>(row) * in.num_heads + head) * kHeadDim;
  } else if (is_v) {
    out = target.v_row(row, head - in.num_heads - in.num_kv_heads);
  } else {
    out = target.k_row(row, head - in.num_heads);
  }
  for (int j = 0; j < kPairs; ++j) {
    const int i = lane * kPairs + j;
    const float c = is_v ? 1.0F : cosine[i] * in.scale;
    const float s = is_v ? 0.0F : sine[i] * in.scale;
    out[i] = from_float<T>(low[j] * c - high[j] * s);
    out[kHalf + i] = from_float<T>(high[j] * c + low[j] * s);
  }
}

// Grid: [rows, parts of the heads].
template <typename T, int kHeadDim, typename Target>
__global__ void rope_kernel(const RopeInput<T> in, const Target target) {
  constexpr int kHalf = kHeadDim / 2;
  __shared__ float cosine[kHalf];
  __shared__ float sine[kHalf];
  allow_next_kernel();
  const int row = blockIdx.x;
  // Positions don't change within a step.
  for (int i = threadIdx.x; i < kHalf; i += blockDim.x) {
    const float angle = static_cast<float>(target.position(row)) * in.inv_freq[i];
    sincosf(angle, &sine[i], &cosine[i]);
  }
  __syncthreads();
  wait_for_earlier_kernels();
  const int num_all = in.num_heads + 2 * in.num_kv_heads;
  const int stride = static_cast<int>(gridDim.y) * kWarps;
  for (int head = blockIdx.y * kWarps + threadIdx.x / 32; head < num_all; head += stride) {
    rotate<T, kHeadDim>(in, target, row, head, cosine, sine);
  }
}

template <typename T, typename Target>
void rope(const RopeArgs& args, const Target& target, CudaStream& stream) {
  if (args.rows == 0) return;
  const RopeInput<T> in{static_cast<const T*>(args.qkv),
                        args.q_norm,
                        args.k_norm,
                        args.norm_eps,
                        args.inv_freq,
                        args.scale,
                        args.num_heads,
                        args.num_kv_heads,
                        static_cast<T*>(args.q_out)};
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  // Few rows need all heads at once; of many, one block of threads has a row's sines to itself.
  constexpr int kManyRows = 256;
  const dim3 grid(args.rows, args.rows < kManyRows ? (heads + kWarps - 1) / kWarps : 1);
  FT_CHECK(args.head_dim == 64 || args.head_dim == 128, args.head_dim);
  if (args.head_dim == 64) {
    launch_overlapped(rope_kernel<T, 64, Target>, grid, 32 * kWarps, 0, stream, in, target);
  } else {
    launch_overlapped(rope_kernel<T, 128, Target>, grid, 32 * kWarps, 0, stream, in, target);
  }
}

}  // namespace

void rope_prefill(const RopePrefillArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.kv_type == activation);
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    rope<T>(args,
            ScratchTarget<T>{static_cast<T*>(args.k_out), static_cast<T*>(args.v_out), args.begin,
                             args.scratch_tokens, args.head_dim},
            stream);
  });
}

void rope_decode(const RopeDecodeArgs& args, DataType activation, CudaStream& stream) {
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    rope<T>(args, OpenBlockTarget<T>{args.sequences, args.layer, args.head_dim}, stream);
  });
}

}  // namespace foretoken::kernels::cuda
