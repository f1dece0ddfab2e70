// What is done with a product's sums before they are stored: bias, SwiGLU, residual.
#pragma once

#include "kernels/cuda/types.cuh"

namespace foretoken::kernels::cuda {

template <typename T>
struct ProductOut {
  const float* bias;  // or null
  const T* residual;  // or null
  void* data;         // [rows, columns] of Out
  int columns;        // the product's features; of SwiGLU, half of them
};

// The value of a feature of a row, from its sums; of SwiGLU (kParts = 2) a gate's and its up's.
template <int kParts, typename T>
__device__ float finish_product(const ProductOut<T>& out, int row, int feature,
                                const float (&sums)[kParts]) {
  float value = sums[0];
  if (out.bias != nullptr) value += out.bias[feature];
  if constexpr (kParts == 2) {
    float up = sums[1];
    if (out.bias != nullptr) up += out.bias[out.columns + feature];
    value = silu(value) * up;
  } else if (out.residual != nullptr) {
    value += to_float(out.residual[static_cast<std::size_t>(row) * out.columns + feature]);
  }
  return value;
}

template <typename Out, int kParts, typename T>
__device__ void store_product(const ProductOut<T>& out, int row, int feature,
                              const float (&sums)[kParts]) {
  const std::size_t at = static_cast<std::size_t>(row) * out.columns + feature;
  static_cast<Out*>(out.data)[at] = from_float<Out>(finish_product(out, row, feature, sums));
}

}  // namespace foretoken::kernels::cuda
