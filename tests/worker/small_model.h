// What the tests of the engine serve: a model of random weights, small enough for a CPU.
#pragma once

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "common/model_config.h"
#include "common/service_config.h"

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

inline ServiceConfig service(const std::string& policy, int budget = 1024) {
  ServiceConfig config;
  config.kv_policy = policy;
  config.kv_budget = budget;
  config.threads_per_rank = 2;
  config.device_memory_gib = 0.5;
  config.max_batched_tokens = 128;
  config.max_num_seqs = 4;
  // The same tests on a GPU: FORETOKEN_TEST_DEVICE=cuda worker_test
  const char* device = std::getenv("FORETOKEN_TEST_DEVICE");
  config.device = device != nullptr ? device : "cpu";
  return config;
}

inline std::vector<TokenId> random_prompt(int length, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> prompt(static_cast<std::size_t>(length));
  for (TokenId& token : prompt) token = static_cast<TokenId>(random() % 512);
  return prompt;
}

}  // namespace foretoken::worker
