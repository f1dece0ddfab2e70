// Number types in device code: conversion, vector loads, and dispatch from a DataType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/check.h"
#include "kernels/kv_layout.h"

namespace foretoken::kernels::cuda {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) for the 16-bit type that `type` names.
template <typename F>
void with_half_type(DataType type, F&& f) {
  FT_CHECK(type != DataType::kFp32, static_cast<int>(type));
  if (type == DataType::kBf16) {
    f(TypeTag<__nv_bfloat16>{});
  } else {
    f(TypeTag<__half>{});
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// Eight 16-bit values, loaded and stored at once.
template <typename T>
struct alignas(16) Vec8 {
  T v[8];
};

__device__ inline float silu(float x) { return x / (1.0F + __expf(-x)); }

__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0U, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, offset));
  return x;
}

}  // namespace foretoken::kernels::cuda
