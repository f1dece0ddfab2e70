#include "common/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>
#include <utility>

#include "common/internal/model_folder.h"

namespace foretoken {
namespace {

using internal::model_error;
using Json = nlohmann::json;

constexpr int kMaxDepth = 16;
constexpr const char* kConfigFile = "config.json";
constexpr const char* kGenerationFile = "generation_config.json";

struct FamilyInfo {
  ModelFamily family;
  std::string_view name;
  std::string_view architecture;
};

constexpr std::array kFamilies = {
    FamilyInfo{ModelFamily::kLlama, "llama", "LlamaForCausalLM"},
    FamilyInfo{ModelFamily::kMistral, "mistral", "MistralForCausalLM"},
    FamilyInfo{ModelFamily::kQwen2, "qwen2", "Qwen2ForCausalLM"},
    FamilyInfo{ModelFamily::kQwen3, "qwen3", "Qwen3ForCausalLM"},
};

// One JSON object, read field by field. The first field that is wrong is kept in `error()`, and
// what is read after it doesn't count: so a reader is a plain list of fields, checked once.
// A field that is null reads as one that isn't there, as in transformers.
class Fields {
 public:
  Fields(const Json& object, std::string file, std::string prefix = {})
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  const std::optional<Error>& error() const { return error_; }
  bool has(const char* name) const { return find(name) != nullptr; }

  void fail(const std::string& name, const std::string& what) {
    if (!error_) error_ = model_error(file_ + ": " + prefix_ + name + " " + what);
  }

  std::int64_t integer(const char* name, std::int64_t least, std::int64_t most,
                       std::optional<std::int64_t> otherwise = std::nullopt) {
    const Json* value = find(name);
    if (value == nullptr && otherwise) return *otherwise;
    if (value == nullptr) return fail(name, "is missing"), least;
    return check_integer(name, *value, least, most);
  }

  double number(const char* name, double least, double most,
                std::optional<double> otherwise = std::nullopt) {
    const Json* value = find(name);
    if (value == nullptr && otherwise) return *otherwise;
    if (value == nullptr) return fail(name, "is missing"), least;
    const double number = value->is_number() ? value->get<double>() : std::nan("");
    if (number >= least && number <= most) return number;
    fail(name, "is " + brief(*value) + "; it must be a number from " + Json(least).dump() + " to " +
                   Json(most).dump());
    return least;
  }

  bool boolean(const char* name, bool otherwise) {
    const Json* value = find(name);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) fail(name, "is " + brief(*value) + "; it must be true or false");
    return value->is_boolean() && value->get<bool>();
  }

  std::string text(const char* name, const std::string& otherwise) {
    const Json* value = find(name);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) fail(name, "is " + brief(*value) + "; it must be a text");
    return value->is_string() ? value->get<std::string>() : otherwise;
  }

  // One token id, a list of them, or nothing.
  std::vector<std::int64_t> token_ids(const char* name, std::int64_t vocab_size) {
    const Json* value = find(name);
    if (value == nullptr) return {};
    const Json list = value->is_array() ? *value : Json::array({*value});
    std::vector<std::int64_t> ids;
    for (const Json& id : list) ids.push_back(check_integer(name, id, 0, vocab_size - 1));
    return ids;
  }

  const Json* find(const char* name) const {
    const auto at = object_.find(name);
    return at == object_.end() || at->is_null() ? nullptr : &*at;
  }

 private:
  static std::string brief(const Json& value) {
    std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
    if (text.size() > 60) text = text.substr(0, 60) + "...";
    return text;
  }

  std::int64_t check_integer(const char* name, const Json& value, std::int64_t least,
                             std::int64_t most) {
    // An unsigned beyond int64 would turn negative, so it is compared as what it is.
    if (value.is_number_integer()) {
      const bool fits =
          !value.is_number_unsigned() || std::in_range<std::int64_t>(value.get<std::uint64_t>());
      const std::int64_t number = fits ? value.get<std::int64_t>() : -1;
      if (fits && number >= least && number <= most) return number;
    }
    fail(name, "is " + brief(value) + "; it must be a whole number from " + std::to_string(least) +
                   " to " + std::to_string(most));
    return least;
  }

  const Json& object_;
  std::string file_;
  std::string prefix_;
  std::optional<Error> error_;
};

std::string supported_architectures() {
  std::string list;
  for (const FamilyInfo& info : kFamilies) {
    list += (list.empty() ? "" : ", ") + std::string(info.architecture);
  }
  return list;
}

Result<ModelFamily> read_family(const Json& json) {
  const auto at = json.find("architectures");
  if (at == json.end() || !at->is_array() || at->size() != 1 || !at->front().is_string()) {
    return model_error("config.json: architectures must be a list of one name; supported: " +
                       supported_architectures());
  }
  const auto name = at->front().get<std::string>();
  for (const FamilyInfo& info : kFamilies) {
    if (info.architecture == name) return info.family;
  }
  return model_error("config.json: architectures is '" + name +
                     "', which isn't supported; supported: " + supported_architectures());
}

void read_sizes(Fields& fields, ModelConfig& config) {
  config.hidden_size = fields.integer("hidden_size", 1, 1 << 20);
  config.num_layers = fields.integer("num_hidden_layers", 1, 4096);
  config.num_heads = fields.integer("num_attention_heads", 1, 1 << 14);
  config.num_kv_heads = fields.integer("num_key_value_heads", 1, 1 << 14, config.num_heads);
  config.intermediate_size = fields.integer("intermediate_size", 1, 1 << 24);
  config.vocab_size = fields.integer("vocab_size", 1, 1 << 24);
  config.max_position = fields.integer("max_position_embeddings", 1, 1 << 30);
  config.rms_norm_eps = fields.number("rms_norm_eps", 1e-12, 1.0, 1e-6);

  const bool divides = config.hidden_size % config.num_heads == 0;
  if (!fields.has("head_dim") && !divides) {
    fields.fail("num_attention_heads", "doesn't divide hidden_size, and there is no head_dim");
  }
  config.head_dim = fields.integer("head_dim", 2, 1024, config.hidden_size / config.num_heads);
  if (config.head_dim < 2 || config.head_dim > 1024 || config.head_dim % 2 != 0) {
    fields.fail("head_dim",
                "must be even and from 2 to 1024, it is " + std::to_string(config.head_dim));
  }
  if (config.num_heads % config.num_kv_heads != 0) {
    fields.fail("num_key_value_heads", "doesn't divide num_attention_heads");
  }
}

void read_biases(Fields& fields, ModelConfig& config) {
  const bool attention_bias = fields.boolean("attention_bias", false);
  switch (config.family) {
    case ModelFamily::kLlama:
      config.qkv_bias = config.o_bias = attention_bias;
      config.mlp_bias = fields.boolean("mlp_bias", false);
      break;
    case ModelFamily::kMistral:
      break;
    case ModelFamily::kQwen2:
      config.qkv_bias = true;
      break;
    case ModelFamily::kQwen3:
      config.qkv_bias = config.o_bias = attention_bias;
      config.qk_norm = true;
      break;
  }
}

// What would change the arithmetic in a way that isn't implemented is refused.
void refuse_unsupported(Fields& fields, const ModelConfig& config) {
  const std::string activation = fields.text("hidden_act", "silu");
  if (activation != "silu")
    fields.fail("hidden_act", "is '" + activation + "'; only silu is served");
  if (fields.has("quantization_config")) {
    fields.fail("quantization_config", "is set; quantized weights aren't served");
  }
  if (fields.number("partial_rotary_factor", 0, 1, 1.0) != 1.0) {
    fields.fail("partial_rotary_factor", "must be 1");
  }
  const bool qwen = config.family == ModelFamily::kQwen2 || config.family == ModelFamily::kQwen3;
  const bool windowed = config.family == ModelFamily::kMistral ||
                        (qwen && fields.boolean("use_sliding_window", false));
  const std::int64_t window = fields.integer("sliding_window", 0, 1 << 30, config.max_position);
  if (windowed && window < config.max_position) {
    fields.fail("sliding_window", "is " + std::to_string(window) + ", less than the context of " +
                                      std::to_string(config.max_position) +
                                      "; sliding windows aren't served");
  }
}

void read_rope_scaling(Fields& rope, ModelConfig& config) {
  RopeScaling& scaling = config.rope_scaling;
  const std::string kind = rope.text("rope_type", rope.text("type", "default"));
  if (kind == "default") return;
  scaling.factor = rope.number("factor", 1, 1e6);
  if (kind == "linear") {
    scaling.kind = RopeScalingKind::kLinear;
  } else if (kind == "llama3") {
    scaling.kind = RopeScalingKind::kLlama3;
    scaling.low_freq_factor = rope.number("low_freq_factor", 1e-6, 1e6);
    scaling.high_freq_factor = rope.number("high_freq_factor", 1e-6, 1e6);
    scaling.original_max_position = rope.integer("original_max_position_embeddings", 1, 1 << 30);
    if (scaling.low_freq_factor >= scaling.high_freq_factor) {
      rope.fail("low_freq_factor", "must be less than high_freq_factor");
    }
  } else if (kind == "yarn") {
    scaling.kind = RopeScalingKind::kYarn;
    scaling.beta_fast = rope.number("beta_fast", 1e-6, 1e6, 32);
    scaling.beta_slow = rope.number("beta_slow", 1e-6, 1e6, 1);
    scaling.attention_factor =
        rope.number("attention_factor", 1e-6, 1e6, 0.1 * std::log(scaling.factor) + 1);
    scaling.original_max_position =
        rope.integer("original_max_position_embeddings", 1, 1 << 30, config.max_position);
    // The stretched context, as serving engines take it: Qwen's files state the trained one.
    const double stretched = scaling.factor * static_cast<double>(scaling.original_max_position);
    config.max_position = std::max(config.max_position,
                                   static_cast<std::int64_t>(std::min(stretched, double{1 << 30})));
    for (const char* name : {"mscale", "mscale_all_dim", "truncate"}) {
      if (rope.has(name)) rope.fail(name, "isn't supported with yarn");
    }
  } else {
    rope.fail("rope_type", "is '" + kind + "'; supported: default, linear, llama3, yarn");
  }
}

// The classic layout has rope_theta and rope_scaling; transformers 5 has both in rope_parameters.
Status read_rope(Fields& fields, ModelConfig& config) {
  config.rope_theta = fields.number("rope_theta", 1, 1e12, 10000.0);
  const char* name = fields.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const Json* object = fields.find(name);
  if (object == nullptr) return Ok{};
  if (!object->is_object()) return fields.fail(name, "isn't an object"), Ok{};
  Fields rope(*object, kConfigFile, std::string(name) + ".");
  config.rope_theta = rope.number("rope_theta", 1, 1e12, config.rope_theta);
  if (rope.number("partial_rotary_factor", 0, 1, 1.0) != 1.0) {
    rope.fail("partial_rotary_factor", "must be 1");
  }
  read_rope_scaling(rope, config);
  if (rope.error()) return *rope.error();
  return Ok{};
}

void read_dtype(Fields& fields, ModelConfig& config) {
  const std::string name = fields.text("dtype", fields.text("torch_dtype", "float32"));
  if (name == "float32") {
    config.dtype = ModelDtype::kF32;
  } else if (name == "float16") {
    config.dtype = ModelDtype::kF16;
  } else if (name == "bfloat16") {
    config.dtype = ModelDtype::kBf16;
  } else {
    fields.fail("torch_dtype", "is '" + name + "'; supported: float32, float16, bfloat16");
  }
}

Status add_generation_config(std::string_view text, ModelConfig& config) {
  FT_ASSIGN_OR_RETURN(const Json json,
                      internal::parse_json_object(text, kGenerationFile, kMaxDepth));
  Fields fields(json, kGenerationFile);
  for (const std::int64_t id : fields.token_ids("eos_token_id", config.vocab_size)) {
    if (std::find(config.eos_ids.begin(), config.eos_ids.end(), id) == config.eos_ids.end()) {
      config.eos_ids.push_back(id);
    }
  }
  if (fields.error()) return *fields.error();
  return Ok{};
}

// YaRN (arXiv 2309.00071): dimensions that turn often within the trained context keep their
// frequency, those that turn seldom are stretched by `factor`, with a ramp between.
// As transformers' _compute_yarn_parameters.
double yarn_stretch(const ModelConfig& config, double pair) {
  const RopeScaling& scaling = config.rope_scaling;
  const auto dim = static_cast<double>(config.head_dim);
  const auto correction = [&](double rotations) {
    return dim *
           std::log(static_cast<double>(scaling.original_max_position) /
                    (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(config.rope_theta));
  };
  const double low = std::max(std::floor(correction(scaling.beta_fast)), 0.0);
  double high = std::min(std::ceil(correction(scaling.beta_slow)), dim - 1);
  if (low == high) high += 0.001;
  const double ramp = std::clamp((pair - low) / (high - low), 0.0, 1.0);
  return ramp / scaling.factor + (1 - ramp);
}

// Llama 3.1 (transformers' _compute_llama3_parameters): long wavelengths are stretched by `factor`,
// short ones kept, with a linear blend in frequency between.
double llama3_stretch(const RopeScaling& scaling, double frequency) {
  const double turns =
      static_cast<double>(scaling.original_max_position) * frequency / (2 * std::numbers::pi);
  const double smooth = std::clamp(
      (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0,
      1.0);
  return (1 - smooth) / scaling.factor + smooth;
}

}  // namespace

std::string_view model_family_name(ModelFamily family) {
  const auto at = std::find_if(kFamilies.begin(), kFamilies.end(),
                               [&](const FamilyInfo& info) { return info.family == family; });
  FT_CHECK(at != kFamilies.end());
  return at->name;
}

Result<ModelConfig> parse_model_config(std::string_view config_text,
                                       std::string_view generation_text) {
  FT_ASSIGN_OR_RETURN(const Json json,
                      internal::parse_json_object(config_text, kConfigFile, kMaxDepth));
  ModelConfig config;
  FT_ASSIGN_OR_RETURN(config.family, read_family(json));
  Fields fields(json, kConfigFile);
  read_sizes(fields, config);
  read_biases(fields, config);
  refuse_unsupported(fields, config);
  read_dtype(fields, config);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", false);
  config.bos_ids = fields.token_ids("bos_token_id", config.vocab_size);
  config.eos_ids = fields.token_ids("eos_token_id", config.vocab_size);
  FT_RETURN_IF_ERROR(read_rope(fields, config));
  if (fields.error()) return *fields.error();
  if (!generation_text.empty()) {
    FT_RETURN_IF_ERROR(add_generation_config(generation_text, config));
  }
  return config;
}

Result<ModelConfig> read_model_config(const std::filesystem::path& folder) {
  const auto read = [&](const char* name) -> Result<std::string> {
    FT_ASSIGN_OR_RETURN(const auto path, internal::find_in_folder(folder, name));
    return internal::read_text(path, internal::kMaxConfigBytes);
  };
  FT_ASSIGN_OR_RETURN(const std::string config_text, read(kConfigFile));
  std::string generation_text;
  std::error_code failed;
  if (std::filesystem::exists(folder / kGenerationFile, failed)) {
    FT_ASSIGN_OR_RETURN(generation_text, read(kGenerationFile));
  }
  Result<ModelConfig> config = parse_model_config(config_text, generation_text);
  if (config) return config;
  return model_error(folder.string() + "/" + config.error().message);
}

std::vector<double> rope_inverse_frequencies(const ModelConfig& config) {
  std::vector<double> frequencies;
  for (std::int64_t pair = 0; pair < config.head_dim / 2; ++pair) {
    const double exponent = 2.0 * static_cast<double>(pair) / static_cast<double>(config.head_dim);
    double frequency = std::pow(config.rope_theta, -exponent);
    switch (config.rope_scaling.kind) {
      case RopeScalingKind::kNone:
        break;
      case RopeScalingKind::kLinear:
        frequency /= config.rope_scaling.factor;
        break;
      case RopeScalingKind::kLlama3:
        frequency *= llama3_stretch(config.rope_scaling, frequency);
        break;
      case RopeScalingKind::kYarn:
        frequency *= yarn_stretch(config, static_cast<double>(pair));
        break;
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

}  // namespace foretoken
