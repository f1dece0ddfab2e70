// The online softmax, to base 2: a running maximum, and sums that stand under it.
#pragma once

#include <cmath>

namespace foretoken::kernels::cuda {

constexpr float kLog2E = 1.44269504F;
constexpr float kNothing = -INFINITY;  // the maximum of no logits

// What stood under one maximum, under a higher one.
__device__ inline float scale_of(float maximum, float higher) {
  return maximum == kNothing ? 0.0F : exp2f(maximum - higher);
}

}  // namespace foretoken::kernels::cuda
