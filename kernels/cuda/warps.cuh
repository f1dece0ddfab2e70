// Work that the warps of a whole grid share:
//   for (int i = warp_index(); i < count; i += num_warps<kWarps>())
#pragma once

namespace foretoken::kernels::cuda {

// Neighbouring work goes to different CTAs, so that little work uses every CTA too.
__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
}
// kWarps: of a CTA.
template <int kWarps>
__device__ int num_warps() {
  return static_cast<int>(gridDim.x) * kWarps;
}

}  // namespace foretoken::kernels::cuda
