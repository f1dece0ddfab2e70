// Linear: out = x W^T on the GPU. Few rows (decode) are bound by reading W and go to our own
// kernels (gemv.cu, few_rows.cu); many rows (prefill) go to cuBLASLt.
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

// Up to this many rows gemv() is the fastest (docs/measurements.md), then multiply_few_rows().
inline constexpr int kMaxGemvRows = 2;
inline constexpr int kMaxFewRows = 8;
// Whether gemv() takes the product: few rows, and columns that its loads and memory allow.
bool can_gemv(const LinearArgs& args);
// REQUIRES: can_gemv(args).
void gemv(const LinearArgs& args, DataType activation, CudaStream& stream);

// Whether run_chain() takes them: one row, and sums that the next product takes as its x.
bool can_chain(const LinearChainArgs& args);
// REQUIRES: can_chain(args).
void run_chain(const LinearChainArgs& args, DataType activation, CudaStream& stream);

bool can_multiply_few_rows(const LinearArgs& args);
// With x in place of args.x, which is normed already where args has a norm. REQUIRES:
// can_multiply_few_rows(args).
void multiply_few_rows(const LinearArgs& args, const void* x, DataType activation,
                       CudaStream& stream);

}  // namespace foretoken::kernels::cuda
