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

// What is added to a feature's sums of a row; of SwiGLU (kParts = 2) to a gate's and its up's.
template <int kParts, typename T>
struct Addends {
  float bias[kParts];
  T residual;  // of kParts = 1
};

// Apart from the rest, so that a kernel may have them under way while it makes the sums.
template <int kParts, typename T>
__device__ Addends<kParts, T> load_addends(const ProductOut<T>& out, int row, int feature) {
  Addends<kParts, T> addends{};
  if (out.bias != nullptr) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      addends.bias[part] = out.bias[part * out.columns + feature];
    }
  }
  if (kParts == 1 && out.residual != nullptr) {
    addends.residual = out.residual[static_cast<std::size_t>(row) * out.columns + feature];
  }
  return addends;
}

// The value of a feature of a row, from its sums.
template <int kParts, typename T>
__device__ float finish_product(const float (&sums)[kParts], const Addends<kParts, T>& addends) {
  const float value = sums[0] + addends.bias[0];
  if constexpr (kParts == 1) {
    return value + to_float(addends.residual);
  } else {
    return silu(value) * (sums[1] + addends.bias[1]);
  }
}

template <typename Out, int kParts, typename T>
__device__ void store_product(const ProductOut<T>& out, int row, int feature,
                              const float (&sums)[kParts], const Addends<kParts, T>& addends) {
  const std::size_t at = static_cast<std::size_t>(row) * out.columns + feature;
  static_cast<Out*>(out.data)[at] = from_float<Out>(finish_product(sums, addends));
}

template <typename Out, int kParts, typename T>
__device__ void store_product(const ProductOut<T>& out, int row, int feature,
                              const float (&sums)[kParts]) {
  store_product<Out>(out, row, feature, sums, load_addends<kParts>(out, row, feature));
}

}  // namespace foretoken::kernels::cuda
