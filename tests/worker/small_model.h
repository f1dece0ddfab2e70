// What the tests of the engine serve: a model of random weights, small enough for a CPU.
#pragma once

#include "common/model_config.h"

namespace foretoken::worker {

inline ModelConfig small_model() {
  ModelConfig config;
  config.hidden_size = 128;
  config.num_layers = 3;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.intermediate_size = 256;
  config.vocab_size = 512;
  config.max_position = 2048;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 10000;
  config.tie_word_embeddings = false;
  config.dtype = ModelDtype::kBf16;
  return config;
}

}  // namespace foretoken::worker
