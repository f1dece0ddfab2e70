// How many layers a gather brings at once.
#pragma once

#include <algorithm>

#include "kernels/device.h"

namespace foretoken::worker {

// Of the gather that begins with `layer`. On a GPU each gather and each join takes its
// microseconds, and gathers stay ahead of the layers, so that they may become rarer.
inline int layers_to_fetch(const kernels::Device& device, int layer, int num_layers) {
  constexpr int kMost = 4;
  const int wanted = device.runs_at_once() ? 1 : std::clamp(layer, 1, kMost);
  return std::min(wanted, num_layers - layer);
}

}  // namespace foretoken::worker
