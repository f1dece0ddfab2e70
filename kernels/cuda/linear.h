// Linear: out = x W^T on the GPU. Few rows (decode) are bound by reading W and go to our own
// kernel (gemv.cu); many rows (prefill) go to cuBLASLt.
#pragma once

#include <memory>
#include <span>

#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// [rows, columns] in the device's activation type, last index fastest.
class CudaWeight final : public Weight {
 public:
  DeviceBuffer memory;
};

// Stacks the parts. Others than the device's type are converted.
std::unique_ptr<Weight> make_cuda_weight(Device& device, DataType activation,
                                         std::span<const WeightPart> parts);

class Linear {
 public:
  explicit Linear(DataType activation);
  ~Linear();
  void run(const LinearArgs& args, CudaStream& stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Up to this many rows gemv() is faster than cuBLASLt (docs/measurements.md).
inline constexpr int kMaxGemvRows = 2;
// Whether gemv() takes the product: few rows, and columns that its loads and memory allow.
bool can_gemv(const LinearArgs& args);
// REQUIRES: can_gemv(args).
void gemv(const LinearArgs& args, DataType activation, CudaStream& stream);

}  // namespace foretoken::kernels::cuda
