#include "worker/internal/model_loader.h"

#include <array>
#include <bit>
#include <cstring>
#include <exception>
#include <utility>

#include "common/check.h"
#include "common/half.h"
#include "common/log.h"

namespace foretoken::worker {
namespace {

kernels::DataType data_type(TensorDtype dtype) {
  switch (dtype) {
    case TensorDtype::kF32:
      return kernels::DataType::kFp32;
    case TensorDtype::kF16:
      return kernels::DataType::kFp16;
    case TensorDtype::kBf16:
      return kernels::DataType::kBf16;
    default:
      break;
  }
  FT_CHECK(false, static_cast<int>(dtype));  // the reader refuses all others
}

float float_from(const std::byte* data, TensorDtype dtype) {
  if (dtype == TensorDtype::kF32) {
    float value = 0;
    std::memcpy(&value, data, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, data, sizeof bits);
  if (dtype == TensorDtype::kBf16) return std::bit_cast<float>(std::uint32_t{bits} << 16);
  return float_from_half(bits);
}

std::vector<float> floats_from(const TensorView& view, Range range) {
  const std::size_t element = tensor_dtype_bytes(view.dtype);
  std::vector<float> values(static_cast<std::size_t>(range.count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t at = (static_cast<std::size_t>(range.begin) + i) * element;
    values[i] = float_from(view.bytes.data() + at, view.dtype);
  }
  return values;
}

}  // namespace

ModelLoader::ModelLoader(Model& model, const WeightSource& weights, LoadProgress& progress)
    : model_(model),
      weights_(weights),
      config_(model.config_),
      part_(model.part_),
      progress_(progress) {}

// Where a load failed, what is under way still reads what it was given.
ModelLoader::~ModelLoader() {
  try {
    model_.device_.finish_uploads();
  } catch (const std::exception& failure) {
    log().warn("weights: {}", failure.what());
  }
}

std::int64_t ModelLoader::total_bytes() const {
  const std::int64_t heads = 2 * (part_.heads.count + part_.kv_heads.count) * config_.head_dim;
  const std::int64_t layer = config_.hidden_size * (heads + 3 * part_.intermediate.count);
  const std::int64_t tables = 2 * part_.vocab.count * config_.hidden_size;
  return (config_.num_layers * layer + tables) * (config_.dtype == ModelDtype::kF32 ? 4 : 2);
}

Status ModelLoader::load() {
  progress_.begin(total_bytes());
  FT_RETURN_IF_ERROR(load_embedding());
  model_.layers_.resize(static_cast<std::size_t>(config_.num_layers));
  for (int i = 0; i < static_cast<int>(config_.num_layers); ++i) {
    FT_RETURN_IF_ERROR(load_layer(i));
  }
  FT_RETURN_IF_ERROR(load_head());
  std::vector<float> inv_freq;
  for (const double value : rope_inverse_frequencies(config_)) {
    inv_freq.push_back(static_cast<float>(value));
  }
  FT_ASSIGN_OR_RETURN(model_.inv_freq_, upload(std::move(inv_freq)));
  model_.device_.finish_uploads();
  progress_.end(weights_.name());
  return Ok{};
}

Status ModelLoader::load_embedding() {
  const std::array shape{config_.vocab_size, config_.hidden_size};
  FT_ASSIGN_OR_RETURN(const TensorView view, weights_.tensor("model.embed_tokens.weight", shape));
  const std::size_t row =
      static_cast<std::size_t>(config_.hidden_size) * tensor_dtype_bytes(view.dtype);
  model_.embedding_ =
      kernels::DeviceBuffer(model_.device_, row * static_cast<std::size_t>(part_.vocab.count),
                            kernels::MemoryUse::kWeights);
  model_.embedding_type_ = data_type(view.dtype);
  model_.device_.upload(model_.embedding_.data(),
                        {view.bytes.data() + row * static_cast<std::size_t>(part_.vocab.begin),
                         static_cast<std::size_t>(part_.vocab.count), row, row});
  progress_.add(static_cast<std::int64_t>(model_.embedding_.bytes()));
  return Ok{};
}

Status ModelLoader::load_layer(int index) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  Model::Layer& layer = model_.layers_[static_cast<std::size_t>(index)];
  FT_ASSIGN_OR_RETURN(layer.attention_norm,
                      vector(prefix + "input_layernorm.weight", config_.hidden_size));
  FT_ASSIGN_OR_RETURN(layer.mlp_norm,
                      vector(prefix + "post_attention_layernorm.weight", config_.hidden_size));
  FT_RETURN_IF_ERROR(load_attention(prefix + "self_attn.", layer));
  return load_mlp(prefix + "mlp.", layer);
}

Range ModelLoader::head_rows(Range heads) const {
  const int head_dim = static_cast<int>(config_.head_dim);
  return {heads.begin * head_dim, heads.count * head_dim};
}

Status ModelLoader::load_attention(const std::string& prefix, Model::Layer& layer) {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t q_rows = config_.num_heads * config_.head_dim;
  const std::int64_t kv_rows = config_.num_kv_heads * config_.head_dim;
  const Range all{0, static_cast<int>(hidden)};
  const Range q = head_rows(part_.heads);
  const Range kv = head_rows(part_.kv_heads);
  const std::array qkv{Slice{prefix + "q_proj", q_rows, hidden, q, all},
                       Slice{prefix + "k_proj", kv_rows, hidden, kv, all},
                       Slice{prefix + "v_proj", kv_rows, hidden, kv, all}};
  FT_ASSIGN_OR_RETURN(layer.qkv, matrix(qkv));
  if (config_.qkv_bias) {
    FT_ASSIGN_OR_RETURN(layer.qkv_bias, biases(qkv));
  }
  const std::array o{Slice{prefix + "o_proj", hidden, q_rows, all, q}};
  FT_ASSIGN_OR_RETURN(layer.o, matrix(o));
  if (config_.o_bias && part_.rank == 0) {  // added once, before the sum over ranks
    FT_ASSIGN_OR_RETURN(layer.o_bias, biases(o));
  }
  if (config_.qk_norm) {
    FT_ASSIGN_OR_RETURN(layer.q_norm, vector(prefix + "q_norm.weight", config_.head_dim));
    FT_ASSIGN_OR_RETURN(layer.k_norm, vector(prefix + "k_norm.weight", config_.head_dim));
  }
  return Ok{};
}

Status ModelLoader::load_mlp(const std::string& prefix, Model::Layer& layer) {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t wide = config_.intermediate_size;
  const Range all{0, static_cast<int>(hidden)};
  const std::array gate_up{Slice{prefix + "gate_proj", wide, hidden, part_.intermediate, all},
                           Slice{prefix + "up_proj", wide, hidden, part_.intermediate, all}};
  FT_ASSIGN_OR_RETURN(layer.gate_up, matrix(gate_up));
  const std::array down{Slice{prefix + "down_proj", hidden, wide, all, part_.intermediate}};
  FT_ASSIGN_OR_RETURN(layer.down, matrix(down));
  if (config_.mlp_bias) {
    FT_ASSIGN_OR_RETURN(layer.gate_up_bias, biases(gate_up));
    if (part_.rank == 0) {
      FT_ASSIGN_OR_RETURN(layer.down_bias, biases(down));
    }
  }
  return Ok{};
}

Status ModelLoader::load_head() {
  FT_ASSIGN_OR_RETURN(model_.final_norm_, vector("model.norm.weight", config_.hidden_size));
  const std::string name = config_.tie_word_embeddings ? "model.embed_tokens" : "lm_head";
  const std::array head{Slice{name,
                              config_.vocab_size,
                              config_.hidden_size,
                              part_.vocab,
                              {0, static_cast<int>(config_.hidden_size)}}};
  FT_ASSIGN_OR_RETURN(model_.lm_head_, matrix(head));
  return Ok{};
}

Result<std::unique_ptr<kernels::Weight>> ModelLoader::matrix(std::span<const Slice> slices) {
  std::vector<kernels::WeightPart> parts;
  for (const Slice& slice : slices) {
    const std::array shape{slice.total_rows, slice.total_columns};
    FT_ASSIGN_OR_RETURN(const TensorView view, weights_.tensor(slice.name + ".weight", shape));
    const std::size_t element = tensor_dtype_bytes(view.dtype);
    const std::size_t stride = element * static_cast<std::size_t>(slice.total_columns);
    parts.push_back({.data = view.bytes.data() +
                             stride * static_cast<std::size_t>(slice.rows.begin) +
                             element * static_cast<std::size_t>(slice.columns.begin),
                     .type = data_type(view.dtype),
                     .rows = slice.rows.count,
                     .columns = slice.columns.count,
                     .row_stride_bytes = stride});
  }
  auto weight = model_.device_.make_weight(parts);
  for (const kernels::WeightPart& part : parts) {
    progress_.add(std::int64_t{part.rows} * part.columns *
                  static_cast<std::int64_t>(kernels::bytes_of(part.type)));
  }
  return weight;
}

Result<kernels::DeviceBuffer> ModelLoader::vector(const std::string& name, std::int64_t size) {
  const std::array shape{size};
  FT_ASSIGN_OR_RETURN(const TensorView view, weights_.tensor(name, shape));
  return upload(floats_from(view, {0, static_cast<int>(size)}));
}

Result<kernels::DeviceBuffer> ModelLoader::biases(std::span<const Slice> slices) {
  std::vector<float> values;
  for (const Slice& slice : slices) {
    const std::array shape{slice.total_rows};
    FT_ASSIGN_OR_RETURN(const TensorView view, weights_.tensor(slice.name + ".bias", shape));
    const std::vector<float> part = floats_from(view, slice.rows);
    values.insert(values.end(), part.begin(), part.end());
  }
  return upload(std::move(values));
}

Result<kernels::DeviceBuffer> ModelLoader::upload(std::vector<float> values) {
  const std::vector<float>& kept = uploading_.emplace_back(std::move(values));
  kernels::DeviceBuffer buffer(model_.device_, kept.size() * sizeof(float),
                               kernels::MemoryUse::kWeights);
  model_.device_.upload(buffer.data(), {std::as_bytes(std::span(kept)).data(), kept.size(),
                                        sizeof(float), sizeof(float)});
  return buffer;
}

}  // namespace foretoken::worker
