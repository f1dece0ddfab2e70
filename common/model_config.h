// ModelConfig: what a Hugging Face model folder says about the model's shape and arithmetic.
//
// read_model_config() reads config.json and generation_config.json (and nothing else), accepts the
// classic layout and that of transformers 5 (`dtype`, `rope_parameters`), and checks every number
// before anyone allocates by it. Supported: Llama 2/3.x and SmolLM2 (LlamaForCausalLM),
// MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.
//
// Plain values; any thread. Example: tests/common/model_config_test.cc
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken {

enum class ModelFamily { kLlama, kMistral, kQwen2, kQwen3 };
std::string_view model_family_name(ModelFamily family);

// The type of weights and activations that the folder declares.
enum class ModelDtype { kF32, kF16, kBf16 };

enum class RopeScalingKind { kNone, kLinear, kLlama3, kYarn };

// How rotary frequencies are stretched beyond the trained context. Fields that a kind doesn't name
// are unused by it. Formulas: transformers, modeling_rope_utils.py.
struct RopeScaling {
  RopeScalingKind kind = RopeScalingKind::kNone;
  double factor = 1;                       // all but none; >= 1
  double low_freq_factor = 1;              // llama3
  double high_freq_factor = 4;             // llama3
  double beta_fast = 32;                   // yarn
  double beta_slow = 1;                    // yarn
  double attention_factor = 1;             // yarn: scales cos and sin both
  bool truncate = true;                    // yarn: correction range in whole dimensions
  std::int64_t original_max_position = 0;  // llama3, yarn
};

struct ModelConfig {
  ModelFamily family = ModelFamily::kLlama;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;  // query heads; a multiple of num_kv_heads
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  // even; num_heads * head_dim need not be hidden_size
  std::int64_t intermediate_size = 0;
  std::int64_t vocab_size = 0;    // rows of the embedding
  std::int64_t max_position = 0;  // context in tokens; with yarn, the stretched one
  double rms_norm_eps = 0;
  double rope_theta = 0;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;   // lm_head is the embedding; no lm_head.weight in the files
  bool qkv_bias = false;              // q_proj, k_proj and v_proj have a bias
  bool o_bias = false;                // o_proj has a bias
  bool mlp_bias = false;              // gate_proj, up_proj and down_proj have a bias
  bool qk_norm = false;               // RMSNorm over head_dim of each Q and K head, before RoPE
  std::vector<std::int64_t> bos_ids;  // none or one
  std::vector<std::int64_t> eos_ids;  // config.json's, then what generation_config.json adds
  ModelDtype dtype = ModelDtype::kF32;
};

// Reads a model folder's configuration. Error: kModelFile, naming the file and the field.
Result<ModelConfig> read_model_config(const std::filesystem::path& folder);

// The same from the texts of the two files; `generation_text` is empty where there is none.
Result<ModelConfig> parse_model_config(std::string_view config_text,
                                       std::string_view generation_text = {});

// The angle that a position step turns each pair of dimensions by: head_dim / 2 values, radians,
// with the scaling applied. Element i turns dimensions i and i + head_dim / 2.
std::vector<double> rope_inverse_frequencies(const ModelConfig& config);

// SHA-256 (hex) over config.json and, of every safetensors file, its size, its header, and a sample
// of every tensor (the first 4 KiB and 4 KiB from the middle). It tells fine-tunes of one model
// apart without reading all weights (about 2 MB for 8B parameters), so it is part of a KV prefix's
// identity; it is no proof that the weights are intact. Error: kModelFile.
Result<std::string> model_hash(const std::filesystem::path& folder);

}  // namespace foretoken
