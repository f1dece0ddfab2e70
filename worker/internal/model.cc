#include "worker/model.h"

#include <cmath>

#include "worker/internal/model_loader.h"

namespace foretoken::worker {
namespace {

kernels::DeviceBuffer rows_of(kernels::Device& device, int rows, std::int64_t columns) {
  const std::size_t element = kernels::bytes_of(device.activation_type());
  return {device, element * static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns),
          kernels::MemoryUse::kActivations};
}

}  // namespace

Activations::Activations(kernels::Device& device, const ModelConfig& config, const Partition& part,
                         int rows)
    : max_rows(rows),
      tokens(device, sizeof(TokenId) * static_cast<std::size_t>(rows),
             kernels::MemoryUse::kActivations),
      normed(rows_of(device, rows, config.hidden_size)),
      qkv(rows_of(device, rows, (part.heads.count + 2 * part.kv_heads.count) * config.head_dim)),
      q(rows_of(device, rows, part.heads.count * config.head_dim)),
      attn(rows_of(device, rows, part.heads.count * config.head_dim)),
      gate_up(rows_of(device, rows, 2 * part.intermediate.count)),
      mlp(rows_of(device, rows, part.intermediate.count)) {}

Model::Model(const ModelConfig& config, const Partition& part, kernels::Device& device,
             Collective& collective)
    : config_(config), part_(part), device_(device), collective_(collective) {
  for (int rank = 0; rank < part.world_size; ++rank) {
    vocab_widths_.push_back(make_partition(config, rank, part.world_size)->vocab.count);
  }
  kv_shape_.num_layers = static_cast<int>(config.num_layers);
  kv_shape_.num_kv_heads = part.kv_heads.count;
  kv_shape_.head_dim = static_cast<int>(config.head_dim);
  kv_shape_.kv_type =
      config.dtype == ModelDtype::kF16 ? kernels::DataType::kFp16 : kernels::DataType::kBf16;
}

Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::load(const ModelConfig& config, const WeightSource& weights,
                                           const Partition& part, kernels::Device& device,
                                           Collective& collective) {
  std::unique_ptr<Model> model(new Model(config, part, device, collective));
  FT_RETURN_IF_ERROR(ModelLoader(*model, weights).load());
  return model;
}

float Model::attention_scale() const {
  return 1.0F / std::sqrt(static_cast<float>(config_.head_dim));
}

void Model::embed(std::span<const TokenId> tokens, Activations& act, const Residual& x,
                  kernels::Stream& stream) {
  const int rows = static_cast<int>(tokens.size());
  FT_CHECK(rows <= act.max_rows, rows, act.max_rows);
  std::vector<TokenId> own(tokens.begin(), tokens.end());
  for (TokenId& token : own) {
    const bool here = token >= part_.vocab.begin && token < part_.vocab.end();
    token = here ? token - part_.vocab.begin : -1;
  }
  device_.copy_in(act.tokens.data(), own.data(), own.size() * sizeof(TokenId), stream);
  stream.synchronize();  // `own` ends here
  const int hidden = static_cast<int>(config_.hidden_size);
  device_.embed({.tokens = act.tokens.as<TokenId>(),
                 .table = embedding_.data(),
                 .table_type = embedding_type_,
                 .num_tokens = rows,
                 .hidden = hidden,
                 .out = x.delta},
                stream);
  device_.fill_zero(x.hidden, residual_bytes(rows), stream);
  collective_.all_reduce(x.delta, static_cast<std::size_t>(rows) * static_cast<std::size_t>(hidden),
                         stream);
}

std::size_t Model::residual_bytes(int rows) const {
  return kernels::bytes_of(device_.activation_type()) * static_cast<std::size_t>(rows) *
         static_cast<std::size_t>(config_.hidden_size);
}

void Model::norm(const kernels::DeviceBuffer& weight, int rows, Activations& act, const Residual& x,
                 kernels::Stream& stream) {
  device_.rms_norm({.x = x.delta,
                    .residual = x.hidden,
                    .weight = weight.as<float>(),
                    .eps = static_cast<float>(config_.rms_norm_eps),
                    .rows = rows,
                    .columns = static_cast<int>(config_.hidden_size),
                    .out = act.normed.data()},
                   stream);
}

void Model::project_qkv(int layer, int rows, Activations& act, const Residual& x,
                        kernels::Stream& stream) {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  norm(weights.attention_norm, rows, act, x, stream);
  device_.linear({.x = act.normed.data(),
                  .weight = weights.qkv.get(),
                  .bias = weights.qkv_bias.as<float>(),
                  .rows = rows,
                  .out = act.qkv.data()},
                 stream);
}

kernels::RopeArgs Model::rope_args(int layer, int rows, Activations& act) const {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  kernels::RopeArgs args{};
  args.qkv = act.qkv.data();
  args.q_norm = weights.q_norm.as<float>();
  args.k_norm = weights.k_norm.as<float>();
  args.norm_eps = static_cast<float>(config_.rms_norm_eps);
  args.inv_freq = inv_freq_.as<float>();
  args.scale = static_cast<float>(config_.rope_scaling.attention_factor);
  args.rows = rows;
  args.num_heads = part_.heads.count;
  args.num_kv_heads = part_.kv_heads.count;
  args.head_dim = static_cast<int>(config_.head_dim);
  args.q_out = act.q.data();
  return args;
}

void Model::finish_layer(int layer, int rows, Activations& act, const Residual& x,
                         kernels::Stream& stream) {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  const std::size_t count =
      static_cast<std::size_t>(rows) * static_cast<std::size_t>(config_.hidden_size);
  device_.linear({.x = act.attn.data(),
                  .weight = weights.o.get(),
                  .bias = weights.o_bias.as<float>(),
                  .rows = rows,
                  .out = x.delta},
                 stream);
  collective_.all_reduce(x.delta, count, stream);
  norm(weights.mlp_norm, rows, act, x, stream);
  device_.linear({.x = act.normed.data(),
                  .weight = weights.gate_up.get(),
                  .bias = weights.gate_up_bias.as<float>(),
                  .rows = rows,
                  .out = act.gate_up.data()},
                 stream);
  device_.swiglu({.gate_up = act.gate_up.data(),
                  .rows = rows,
                  .columns = part_.intermediate.count,
                  .out = act.mlp.data()},
                 stream);
  device_.linear({.x = act.mlp.data(),
                  .weight = weights.down.get(),
                  .bias = weights.down_bias.as<float>(),
                  .rows = rows,
                  .out = x.delta},
                 stream);
  collective_.all_reduce(x.delta, count, stream);
}

void Model::logits(int rows, Activations& act, const Residual& x, float* logits,
                   kernels::Stream& stream) {
  const std::size_t bytes =
      sizeof(float) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(part_.vocab.count);
  if (logits_part_.bytes() < bytes) {
    logits_part_ = kernels::DeviceBuffer(device_, bytes, kernels::MemoryUse::kActivations);
  }
  norm(final_norm_, rows, act, x, stream);
  device_.linear({.x = act.normed.data(),
                  .weight = lm_head_.get(),
                  .bias = nullptr,
                  .rows = rows,
                  .out = logits_part_.data(),
                  .out_fp32 = true},
                 stream);
  collective_.all_gather_columns(logits_part_.as<float>(), logits, rows, vocab_widths_, stream);
}

}  // namespace foretoken::worker
