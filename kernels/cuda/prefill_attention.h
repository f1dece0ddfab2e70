// PrefillAttention: causal attention over the prefill scratch by cuDNN's scaled-dot-product
// attention. Owns the cuDNN handle and the plans, one for each shape of the problem.
#pragma once

#include <memory>

#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

class PrefillAttention {
 public:
  // Loads libcudnn. Throws Exception(kDevice) when it is missing or too old.
  PrefillAttention();
  ~PrefillAttention();
  void run(const PrefillAttentionArgs& args, DataType activation, CudaStream& stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken::kernels::cuda
