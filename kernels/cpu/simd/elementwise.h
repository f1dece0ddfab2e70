// One row of the elementwise ops; kernels/device.h says what they compute.
#pragma once

#include "kernels/kv_layout.h"

namespace foretoken::kernels::simd {

// out = the row as float, or as a 16-bit type; rounds to nearest even.
void to_float(const void* from, DataType type, int columns, float* out);
void from_float(const float* from, int columns, DataType type, void* out);

void add(const float* x, int columns, float* sum);  // sum += x

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
void rms_norm(const float* x, const float* weight, float eps, int columns, float* out);

// out = silu(gate) * up.
void swiglu(const float* gate, const float* up, int columns, float* out);

// out = x rotated by the angles of cos and sin, [head_dim / 2] each; out may be x.
//   (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), for x = [x1 | x2]
void rotate(const float* x, const float* cos, const float* sin, int head_dim, float* out);

}  // namespace foretoken::kernels::simd
