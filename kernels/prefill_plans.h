// prepare_prefill: the plans of a GPU's prefill attention, before a prompt waits for them.
#pragma once

#include <thread>

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

// On a CUDA device the thread makes the plans of all parts that prompts can have, up to 76 ms each,
// until all are made or it is told to stop; it must end before the device does. Whoever needs a
// plan before makes it. None on other devices. Called by the thread that made the device.
std::jthread prepare_prefill(Device& device, const PrefillShape& shape);

}  // namespace foretoken::kernels
