// What the predictor of a GPU takes, for who configures it; more is a broken REQUIRES. A CPU's
// takes any.
#pragma once

namespace foretoken::kernels {

inline constexpr int kMaxPredictSequences = 1024;   // of one predict()
inline constexpr int kMaxPredictColumns = 1 << 16;  // blocks of a sequence: a million tokens
// Layers x sequences of one history_append() with `hold`: CUDA's limit of a grid's third size.
inline constexpr int kMaxHeldRows = 65'535;

}  // namespace foretoken::kernels
