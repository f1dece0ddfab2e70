// The CNN's weights: safetensors with conv1.weight [16, 1, 3, 3], conv2.weight [32, 16, 3, 3],
// conv3.weight [1, 32, 1] and a bias of each, all F32, as predictor/train writes them.
#pragma once

#include <filesystem>

#include "common/result.h"
#include "kernels/device.h"

namespace foretoken::predictor {

// Error: kModelFile, naming file and tensor; also for a weight that is not finite.
Result<kernels::PredictorWeights> read_weights(const std::filesystem::path& path);

// The published weights, trained on Llama-3.1 attention: share/foretoken beside the program's bin.
std::filesystem::path published_weights();

}  // namespace foretoken::predictor
