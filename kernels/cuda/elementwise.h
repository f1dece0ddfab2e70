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

// Bytes of pinned host memory to the device, by a kernel: between two others the copy engine takes
// 8 us for any.
void read_in(void* to, const void* pinned, std::size_t bytes, CudaStream& stream);

}  // namespace foretoken::kernels::cuda
