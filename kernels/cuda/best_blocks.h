// The choice of blocks by score: the last part of predict().
#pragma once

#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// From the scores that the maps' states hold (map_state.cuh): the top_k best columns a map, united
// over the maps of a KV head, at most max_per_head of them. Marks the states as brought to their
// newest row, and sets `num_counters` of the stream's counters back to zero.
void choose_blocks(const PredictArgs& args, int num_counters, CudaStream& stream);

}  // namespace foretoken::kernels::cuda
