// Passes over rows that other ops of this folder need too (elementwise.cu).
#pragma once

#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// out[row, i] += bias[i], for out = [rows, columns] of `type`.
void add_bias(const float* bias, int rows, int columns, void* out, DataType type,
              CudaStream& stream);

// to[i] = from[i], for i < count, in other types. Waits until it is done.
void convert(const void* from, DataType from_type, std::size_t count, void* to, DataType to_type);

}  // namespace foretoken::kernels::cuda
