// PrefillAttention: causal attention over the prefill scratch by cuDNN's scaled-dot-product
// attention. Owns the cuDNN handle and the plans, of which a worker needs few.
#pragma once

#include <memory>

#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"
#include "kernels/prefill_plans.h"

namespace foretoken::kernels::cuda {

class PrefillAttention {
 public:
  // Loads libcudnn. Throws Exception(kDevice) when it is missing or too old.
  PrefillAttention();
  ~PrefillAttention();
  // See prepare_prefill(). For the current device.
  std::jthread prepare(const PrefillShape& shape);
  // The first call that needs a plan makes it, which takes up to 76 ms.
  void run(const PrefillAttentionArgs& args, DataType activation, CudaStream& stream);
  std::size_t num_plans() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken::kernels::cuda
