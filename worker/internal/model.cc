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
                         int rows, int logit_rows)
    : max_rows(rows),
      max_logit_rows(logit_rows),
      normed(rows_of(device, rows, config.hidden_size)),
      qkv(rows_of(device, rows, (part.heads.count + 2 * part.kv_heads.count) * config.head_dim)),
      q(rows_of(device, rows, part.heads.count * config.head_dim)),
      attn(rows_of(device, rows, part.heads.count * config.head_dim)),
      gate_up(rows_of(device, rows, 2 * part.intermediate.count)),
      mlp(rows_of(device, rows, part.intermediate.count)) {
  if (part.world_size == 1) return;
  const auto logits_of = [&](int vocab) {
    return sizeof(float) * static_cast<std::size_t>(logit_rows) * static_cast<std::size_t>(vocab);
  };
  const int widest = make_partition(config, 0, part.world_size)->vocab.count;  // none has more
  logits = {device, logits_of(part.vocab.count), kernels::MemoryUse::kActivations};
  gathered = {device, static_cast<std::size_t>(part.world_size) * logits_of(widest),
              kernels::MemoryUse::kActivations};
}

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
                                           Collective& collective, LoadProgress& progress) {
  std::unique_ptr<Model> model(new Model(config, part, device, collective));
  FT_RETURN_IF_ERROR(ModelLoader(*model, weights, progress).load());
  return model;
}

float Model::attention_scale() const {
  return 1.0F / std::sqrt(static_cast<float>(config_.head_dim));
}

std::size_t Model::hidden_bytes(int rows) const {
  return kernels::bytes_of(device_.activation_type()) * static_cast<std::size_t>(rows) *
         static_cast<std::size_t>(config_.hidden_size);
}

void Model::embed(const TokenId* tokens, int rows, void* hidden, kernels::Stream& stream) {
  kernels::EmbedArgs args{};
  args.tokens = tokens;
  args.num_tokens = rows;
  embed(args, hidden, stream);
}

void Model::embed_next(const kernels::SequenceKv* sequences, int rows, void* hidden,
                       kernels::Stream& stream) {
  kernels::EmbedArgs args{};
  args.sequences = sequences;
  args.num_tokens = rows;
  embed(args, hidden, stream);
}

void Model::embed(kernels::EmbedArgs args, void* hidden, kernels::Stream& stream) {
  args.table = embedding_.data();
  args.table_type = embedding_type_;
  args.first_token = part_.vocab.begin;
  args.table_tokens = part_.vocab.count;
  args.hidden = static_cast<int>(config_.hidden_size);
  args.out = hidden;
  device_.embed(args, stream);
  collective_.all_reduce(
      hidden, static_cast<std::size_t>(args.num_tokens) * static_cast<std::size_t>(args.hidden),
      stream);
}

kernels::NormedInput Model::norm(const kernels::DeviceBuffer& weight,
                                 const Activations& act) const {
  return {weight.as<float>(), static_cast<float>(config_.rms_norm_eps), act.normed.data()};
}

void Model::project_qkv(int layer, int rows, Activations& act, const void* hidden,
                        kernels::Stream& stream) {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  device_.linear({.x = hidden,
                  .weight = weights.qkv.get(),
                  .bias = weights.qkv_bias.as<float>(),
                  .rows = rows,
                  .out = act.qkv.data(),
                  .norm = norm(weights.attention_norm, act)},
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

// hidden += W x. The residual is one rank's summand, so that the sum over ranks counts it once.
void Model::add_product(const kernels::Weight& weight, const kernels::DeviceBuffer& bias,
                        const void* x, int rows, void* hidden, kernels::Stream& stream) {
  device_.linear({.x = x,
                  .weight = &weight,
                  .bias = bias.as<float>(),
                  .rows = rows,
                  .out = hidden,
                  .residual = part_.rank == 0 ? hidden : nullptr},
                 stream);
  collective_.all_reduce(
      hidden, static_cast<std::size_t>(rows) * static_cast<std::size_t>(config_.hidden_size),
      stream);
}

void Model::finish_layer(int layer, int rows, Activations& act, void* hidden,
                         kernels::Stream& stream) {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  add_product(*weights.o, weights.o_bias, act.attn.data(), rows, hidden, stream);
  device_.linear({.x = hidden,
                  .weight = weights.gate_up.get(),
                  .bias = weights.gate_up_bias.as<float>(),
                  .rows = rows,
                  .out = act.mlp.data(),
                  .norm = norm(weights.mlp_norm, act),
                  .swiglu = {act.gate_up.data()}},
                 stream);
  add_product(*weights.down, weights.down_bias, act.mlp.data(), rows, hidden, stream);
}

void Model::logits(int rows, Activations& act, const void* hidden, float* logits,
                   kernels::Stream& stream) {
  FT_CHECK(rows <= act.max_logit_rows, rows, act.max_logit_rows);
  const bool alone = part_.world_size == 1;
  device_.linear({.x = hidden,
                  .weight = lm_head_.get(),
                  .bias = nullptr,
                  .rows = rows,
                  .out = alone ? logits : act.logits.as<float>(),
                  .out_fp32 = true,
                  .norm = norm(final_norm_, act)},
                 stream);
  if (alone) return;
  collective_.all_gather_columns(act.logits.as<float>(), logits, rows, vocab_widths_,
                                 act.gathered.as<float>(), stream);
}

}  // namespace foretoken::worker
