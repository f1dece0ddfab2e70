// prepare_prefill: the plans of a GPU's prefill attention, before a prompt waits for them.
#pragma once

#include "kernels/device.h"

namespace foretoken::kernels {

// What a model's PrefillAttentionArgs have in common, and all that decides which plans there are.
struct PrefillShape {
  DataType kv_type;
  int scratch_tokens;
  int max_rows;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  float scale;
  bool with_lse;
};

// Returns at once; on a CUDA device a thread makes the plans of all parts that prompts can have, up
// to 76 ms each, until they are made or the device ends. Whoever needs one before makes it itself.
// Called at most once, by the thread that made the device.
void prepare_prefill(Device& device, const PrefillShape& shape);

}  // namespace foretoken::kernels
