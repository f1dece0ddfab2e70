// Running sums over the lanes of a warp, and over the threads of a CTA.
#pragma once

namespace foretoken::kernels::cuda {

// The sum of `value` over this lane and those before it. All lanes call it.
template <typename T>
__device__ T warp_inclusive_sum(T value) {
  const int lane = threadIdx.x % 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(~0U, value, offset);
    if (lane >= offset) value += before;
  }
  return value;
}

// The sum of `value` over this thread and those before it; *total: over all. warp_totals:
// [kThreads / 32] shared, free for other use after the next barrier. All threads call it; kThreads
// <= 1024.
template <int kThreads, typename T>
__device__ T inclusive_sum(T value, T* warp_totals, T* total) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  value = warp_inclusive_sum(value);
  if (lane == 31) warp_totals[warp] = value;
  __syncthreads();
  T sum{};
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) value += sum;
    sum += warp_totals[w];
  }
  *total = sum;
  return value;
}

}  // namespace foretoken::kernels::cuda
