// Ops that pass once over their rows: embedding, RMS norm, SwiGLU, and the bias of products that
// cuBLASLt makes.
#include "common/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// args.table, as its type; one block of threads a token.
template <typename Table, typename T>
__global__ void embed_kernel(const EmbedArgs args, const Table* table) {
  allow_next_kernel();
  wait_for_earlier_kernels();
  const int i = blockIdx.x;
  const TokenId token =
      args.tokens != nullptr ? args.tokens[i] : args.sequences[i].tokens[*args.sequences[i].length];
  const int table_row = token - args.first_token;
  const bool here = table_row >= 0 && table_row < args.table_tokens;
  const std::size_t hidden = args.hidden;
  T* row = static_cast<T*>(args.out) + i * hidden;
  for (int column = threadIdx.x; column < hidden; column += kThreads) {
    row[column] = from_float<T>(here ? to_float(table[table_row * hidden + column]) : 0.0F);
  }
}

__device__ float block_sum(float value) {
  __shared__ float parts[kThreads / 32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (const float part : parts) sum += part;
  return sum;
}

template <typename T>
__device__ float sum_of_squares(const Vec8<T>& values) {
  float sum = 0;
  for (const T value : values.v) sum += to_float(value) * to_float(value);
  return sum;
}

template <typename T>
__device__ Vec8<T> scale(const Vec8<T>& values, float factor, const float* weight) {
  const auto* four = reinterpret_cast<const float4*>(weight);
  const float4 w[2] = {four[0], four[1]};
  const auto* weights = reinterpret_cast<const float*>(w);
  Vec8<T> out;
#pragma unroll
  for (int j = 0; j < 8; ++j) out.v[j] = from_float<T>(to_float(values.v[j]) * factor * weights[j]);
  return out;
}

// One block of threads a row, which is read once where it is not longer than 8 * kThreads * kHeld.
// REQUIRES: columns % 8 == 0.
template <typename T>
__global__ void rms_norm_kernel(const T* x, const float* weight, float eps, int columns, T* out) {
  constexpr int kHeld = 2;
  allow_next_kernel();
  wait_for_earlier_kernels();
  const std::size_t offset = static_cast<std::size_t>(blockIdx.x) * columns;
  const auto* in = reinterpret_cast<const Vec8<T>*>(x + offset);
  auto* to = reinterpret_cast<Vec8<T>*>(out + offset);
  const int count = columns / 8;
  Vec8<T> held[kHeld];
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i < count) squares += sum_of_squares(held[k] = in[i]);
  }
  const int rest = threadIdx.x + kHeld * kThreads;
  for (int i = rest; i < count; i += kThreads) squares += sum_of_squares(in[i]);
  const float inverse = rsqrtf(block_sum(squares) / static_cast<float>(columns) + eps);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i < count) to[i] = scale(held[k], inverse, weight + 8 * i);
  }
  for (int i = rest; i < count; i += kThreads) to[i] = scale(in[i], inverse, weight + 8 * i);
}

// REQUIRES: columns % 8 == 0.
template <typename T>
__global__ void swiglu_kernel(const T* gate_up, std::size_t count, int columns, T* out) {
  allow_next_kernel();
  wait_for_earlier_kernels();
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const std::size_t row = i * 8 / columns;
    const std::size_t column = i * 8 % columns;
    const T* gate_at = gate_up + row * 2 * columns + column;
    const auto gate = *reinterpret_cast<const Vec8<T>*>(gate_at);
    const auto up = *reinterpret_cast<const Vec8<T>*>(gate_at + columns);
    Vec8<T> result;
    for (int j = 0; j < 8; ++j) {
      result.v[j] = from_float<T>(silu(to_float(gate.v[j])) * to_float(up.v[j]));
    }
    reinterpret_cast<Vec8<T>*>(out)[i] = result;
  }
}

template <typename T>
__global__ void add_bias_kernel(const float* bias, int columns, T* out) {
  allow_next_kernel();
  wait_for_earlier_kernels();
  T* row = out + static_cast<std::size_t>(blockIdx.x) * columns;
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    row[i] = from_float<T>(to_float(row[i]) + bias[i]);
  }
}

template <typename From, typename To>
__global__ void convert_kernel(const From* from, std::size_t count, To* to) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    to[i] = from_float<To>(to_float(from[i]));
  }
}

// Calls f with `data` as a pointer to the type.
template <typename F>
void with_type(const void* data, DataType type, F&& f) {
  switch (type) {
    case DataType::kFp32:
      return f(static_cast<const float*>(data));
    case DataType::kFp16:
      return f(static_cast<const __half*>(data));
    case DataType::kBf16:
      return f(static_cast<const __nv_bfloat16*>(data));
  }
}

template <typename T>
void embed_rows(const EmbedArgs& args, CudaStream& stream) {
  with_type(args.table, args.table_type, [&](auto* table) {
    using Table = std::remove_cv_t<std::remove_pointer_t<decltype(table)>>;
    launch_overlapped(embed_kernel<Table, T>, args.num_tokens, kThreads, 0, stream, args, table);
  });
}

__global__ void read_in_kernel(const uint2* from, unsigned words, uint2* to) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < words) to[i] = from[i];
}

}  // namespace

// Ops read what doesn't change within a step before those before them are done. So this one is
// launched alone, and the next waits for its end.
void read_in(void* to, const void* pinned, std::size_t bytes, CudaStream& stream) {
  FT_CHECK(bytes % sizeof(uint2) == 0, bytes);
  const auto words = static_cast<unsigned>(bytes / sizeof(uint2));
  if (words == 0) return;
  read_in_kernel<<<(words + kThreads - 1) / kThreads, kThreads, 0, stream.handle()>>>(
      static_cast<const uint2*>(pinned), words, static_cast<uint2*>(to));
  FT_CUDA(cudaGetLastError());
  stream.serialize_next();
}

void embed(const EmbedArgs& args, DataType activation, CudaStream& stream) {
  if (args.num_tokens == 0) return;
  with_half_type(activation,
                 [&](auto tag) { embed_rows<typename decltype(tag)::type>(args, stream); });
}

void rms_norm(const RmsNormArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.columns % 8 == 0, args.columns);
  if (args.rows == 0) return;
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_overlapped(rms_norm_kernel<T>, args.rows, kThreads, 0, stream,
                      static_cast<const T*>(args.x), args.weight, args.eps, args.columns,
                      static_cast<T*>(args.out));
  });
}

void swiglu(const SwiGluArgs& args, DataType activation, CudaStream& stream) {
  FT_CHECK(args.columns % 8 == 0, args.columns);
  const std::size_t count = static_cast<std::size_t>(args.rows) * args.columns / 8;
  if (count == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::min<std::size_t>((count + kThreads - 1) / kThreads, 132 * 16));
  with_half_type(activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_overlapped(swiglu_kernel<T>, blocks, kThreads, 0, stream,
                      static_cast<const T*>(args.gate_up), count, args.columns,
                      static_cast<T*>(args.out));
  });
}

void add_bias(const float* bias, int rows, int columns, void* out, DataType type,
              CudaStream& stream) {
  const auto run = [&](auto* to) {
    launch_overlapped(add_bias_kernel<std::remove_pointer_t<decltype(to)>>, rows, kThreads, 0,
                      stream, bias, columns, to);
  };
  if (type == DataType::kFp32) return run(static_cast<float*>(out));
  with_half_type(type, [&](auto tag) { run(static_cast<typename decltype(tag)::type*>(out)); });
}

void convert(const void* from, DataType from_type, std::size_t count, void* to, DataType to_type) {
  with_type(from, from_type, [&](auto* in) {
    with_half_type(to_type, [&](auto tag) {
      using To = typename decltype(tag)::type;
      convert_kernel<<<132 * 8, kThreads>>>(in, count, static_cast<To*>(to));
    });
  });
  FT_CUDA(cudaDeviceSynchronize());
}

}  // namespace foretoken::kernels::cuda
