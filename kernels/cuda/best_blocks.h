// The choice of blocks by score: the last part of predict().
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// Multiprocessors of the device: what a persistent grid is a multiple of.
inline int num_sms() {
  int device = 0;
  int count = 0;
  FT_CUDA(cudaGetDevice(&device));
  FT_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// From the scores that the maps' states hold (map_state.cuh): the top_k best columns a map, united
// over the maps of a KV head, at most max_per_head of them. Marks the states as brought to their
// newest row, and sets `num_counters` of the stream's counters back to zero.
void choose_blocks(const PredictArgs& args, int num_counters, CudaStream& stream);

}  // namespace foretoken::kernels::cuda
