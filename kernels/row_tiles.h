// round_to_tiles: the row counts that a GPU's products tell apart.
#pragma once

namespace foretoken::kernels {

// CUDA loads a kernel when it first runs, and that waits for all that runs then. So a product of
// many rows has the algorithm of this many, which take as many thread blocks, and whoever serves
// tries each of these counts before (worker/prefill.h).
inline int round_to_tiles(int rows) {
  const int tile = rows <= 64 ? 8 : rows <= 1024 ? 64 : 256;  // few rows are decode's
  return (rows + tile - 1) / tile * tile;
}

}  // namespace foretoken::kernels
