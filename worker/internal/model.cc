#include "worker/model.h"

#include <algorithm>
#include <cmath>

#include "worker/internal/model_loader.h"

namespace foretoken::worker {
namespace {

constexpr int kLeastRows = 512;  // of a part: below it products lose more than sums win (guessed)

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
    : config_(config),
      part_(part),
      device_(device),
      collective_(collective),
      kv_shape_(kv_shape(config, part)) {
  for (int rank = 0; rank < part.world_size; ++rank) {
    vocab_widths_.push_back(make_partition(config, rank, part.world_size)->vocab.count);
  }
}

Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::load(const ModelConfig& config, const WeightSource& weights,
                                           const Partition& part, kernels::Device& device,
                                           Collective& collective, LoadProgress& progress) {
  std::unique_ptr<Model> model(new Model(config, part, device, collective));
  FT_RETURN_IF_ERROR(ModelLoader(*model, weights, progress).load());
  return model;
}

kernels::KvShape Model::kv_shape(const ModelConfig& config, const Partition& part) {
  return {.num_layers = static_cast<int>(config.num_layers),
          .num_kv_heads = part.kv_heads.count,
          .head_dim = static_cast<int>(config.head_dim),
          .kv_type = config.dtype == ModelDtype::kF16 ? kernels::DataType::kFp16
                                                      : kernels::DataType::kBf16};
}

float Model::attention_scale(const ModelConfig& config) {
  return 1.0F / std::sqrt(static_cast<float>(config.head_dim));
}

std::size_t Model::row_bytes(int columns) const {
  return kernels::bytes_of(device_.activation_type()) * static_cast<std::size_t>(columns);
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

kernels::LinearArgs Model::qkv_of(int layer, const Rows& rows, Activations& act,
                                  const void* hidden) const {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  return {.x = static_cast<const std::byte*>(hidden) + hidden_bytes(rows.first),
          .weight = weights.qkv.get(),
          .bias = weights.qkv_bias.as<float>(),
          .rows = rows.count,
          .out = act.qkv.as<std::byte>() +
                 row_bytes(weights.qkv->rows) * static_cast<std::size_t>(rows.first),
          .norm = norm(weights.attention_norm, act)};
}

kernels::LinearArgs Model::gate_up_of(int layer, const Rows& rows, Activations& act,
                                      const std::byte* hidden) const {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  return {.x = hidden + hidden_bytes(rows.first),
          .weight = weights.gate_up.get(),
          .bias = weights.gate_up_bias.as<float>(),
          .rows = rows.count,
          .out = act.mlp.data(),
          .norm = norm(weights.mlp_norm, act),
          .swiglu = {act.gate_up.data()}};
}

kernels::LinearArgs Model::o_of(int layer, const Rows& rows, Activations& act,
                                std::byte* hidden) const {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  const std::byte* x = act.attn.as<std::byte>() +
                       row_bytes(weights.o->columns) * static_cast<std::size_t>(rows.first);
  return added_product(*weights.o, weights.o_bias, x, rows, hidden);
}

kernels::LinearArgs Model::down_of(int layer, const Rows& rows, Activations& act,
                                   std::byte* hidden) const {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  return added_product(*weights.down, weights.down_bias, act.mlp.data(), rows, hidden);
}

// hidden += W x. The residual is one rank's summand, so that the sum over ranks counts it once.
kernels::LinearArgs Model::added_product(const kernels::Weight& weight,
                                         const kernels::DeviceBuffer& bias, const void* x,
                                         const Rows& rows, std::byte* hidden) const {
  std::byte* out = hidden + hidden_bytes(rows.first);
  return {.x = x,
          .weight = &weight,
          .bias = bias.as<float>(),
          .rows = rows.count,
          .out = out,
          .residual = part_.rank == 0 ? out : nullptr};
}

kernels::LinearArgs Model::logits_of(int rows, Activations& act, const void* hidden,
                                     float* logits) const {
  return {.x = hidden,
          .weight = lm_head_.get(),
          .bias = nullptr,
          .rows = rows,
          .out = part_.world_size == 1 ? logits : act.logits.as<float>(),
          .out_fp32 = true,
          .norm = norm(final_norm_, act)};
}

void Model::project_qkv(int layer, int rows, Activations& act, const void* hidden,
                        kernels::Stream& stream) {
  for (const Rows& part : parts(rows, act)) {
    end_sums_of(static_cast<const std::byte*>(hidden) + hidden_bytes(part.first), part.count,
                stream);
    device_.linear(qkv_of(layer, part, act, hidden), stream);
  }
}

void Model::try_products(int layer, int rows, Activations& act, void* hidden,
                         kernels::Stream& stream) {
  auto* x = static_cast<std::byte*>(hidden);
  for (const Rows& part : parts(rows, act)) {
    device_.linear(qkv_of(layer, part, act, x), stream);
    device_.linear(o_of(layer, part, act, x), stream);
    device_.linear(gate_up_of(layer, part, act, x), stream);
    device_.linear(down_of(layer, part, act, x), stream);
  }
}

Model::Rows Model::first_half(int rows) {
  constexpr int kTile = 256;  // rows that a product's thread blocks have together
  return {0, std::min(rows, ((rows + 1) / 2 + kTile - 1) / kTile * kTile)};
}

std::size_t Model::most_begun_bytes(const ModelConfig& config, int max_rows) {
  constexpr std::size_t kActivation = 2;  // of a CUDA device
  const int rows = first_half(max_rows).count;
  if (max_rows - rows < kLeastRows) return 0;
  return kActivation * static_cast<std::size_t>(rows) *
         static_cast<std::size_t>(config.hidden_size);
}

std::vector<Model::Rows> Model::parts(int rows, const Activations& act) const {
  const Rows first = first_half(rows);
  const Rows second{first.count, rows - first.count};
  const auto begins = [&](const Rows& part) {
    return act.begins_sums && part.count >= kLeastRows &&
           collective_.begins_sums(static_cast<std::size_t>(part.count) *
                                   static_cast<std::size_t>(config_.hidden_size));
  };
  if (begins(first) && begins(second)) return {first, second};
  return {{0, rows}};
}

void Model::end_oldest_sum(kernels::Stream& stream) {
  begun_.pop_front();
  collective_.end_sum(stream);
}

void Model::end_sums(kernels::Stream& stream) {
  while (!begun_.empty()) end_oldest_sum(stream);
}

void Model::end_sums_of(const std::byte* hidden, int rows, kernels::Stream& stream) {
  const std::byte* end = hidden + hidden_bytes(rows);
  const auto is_of_them = [&](const Begun& sum) {
    return sum.hidden < end && hidden < sum.hidden + sum.bytes;
  };
  while (std::ranges::any_of(begun_, is_of_them)) end_oldest_sum(stream);
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

void Model::add_up(std::byte* hidden, int rows, bool begins, kernels::Stream& stream) {
  const std::size_t count =
      static_cast<std::size_t>(rows) * static_cast<std::size_t>(config_.hidden_size);
  if (!begins) return collective_.all_reduce(hidden, count, stream);
  if (begun_.size() == Collective::kMaxBegun) end_oldest_sum(stream);
  collective_.begin_sum(hidden, count, stream);
  begun_.push_back({hidden, hidden_bytes(rows)});
}

void Model::finish_layer(int layer, int rows, Activations& act, void* hidden,
                         kernels::Stream& stream) {
  const std::vector<Rows> all = parts(rows, act);
  const bool begins = all.size() > 1;
  auto* x = static_cast<std::byte*>(hidden);
  for (const Rows& part : all) {
    device_.linear(o_of(layer, part, act, x), stream);
    add_up(x + hidden_bytes(part.first), part.count, begins, stream);
  }
  for (const Rows& part : all) {
    end_sums_of(x + hidden_bytes(part.first), part.count, stream);
    device_.linear(gate_up_of(layer, part, act, x), stream);
    device_.linear(down_of(layer, part, act, x), stream);
    add_up(x + hidden_bytes(part.first), part.count, begins, stream);
  }
}

void Model::finish_layer_and_next(int layer, int rows, Activations& act, void* hidden,
                                  float* logits, kernels::Stream& stream) {
  const bool is_last = layer + 1 == num_layers();
  const Rows all{0, rows};
  auto* x = static_cast<std::byte*>(hidden);
  const std::array<kernels::LinearArgs, 4> products = {
      o_of(layer, all, act, x), gate_up_of(layer, all, act, x), down_of(layer, all, act, x),
      is_last ? logits_of(rows, act, hidden, logits) : qkv_of(layer + 1, all, act, hidden)};
  constexpr std::uint32_t kOAndDown = 0b0101;
  const kernels::LinearChainArgs chain{products, part_.world_size == 1 ? 0 : kOAndDown,
                                       collective_.sum_in_chains()};
  if (!device_.chains(chain)) {
    finish_layer(layer, rows, act, hidden, stream);
    return is_last ? this->logits(rows, act, hidden, logits, stream)
                   : project_qkv(layer + 1, rows, act, hidden, stream);
  }
  device_.linear_chain(chain, stream);
  if (is_last) join_logits(rows, act, logits, stream);
}

void Model::logits(int rows, Activations& act, const void* hidden, float* logits,
                   kernels::Stream& stream) {
  FT_CHECK(rows <= act.max_logit_rows, rows, act.max_logit_rows);
  device_.linear(logits_of(rows, act, hidden, logits), stream);
  join_logits(rows, act, logits, stream);
}

void Model::join_logits(int rows, Activations& act, float* logits, kernels::Stream& stream) {
  if (part_.world_size == 1) return;
  collective_.all_gather_columns(act.logits.as<float>(), logits, rows, vocab_widths_,
                                 act.gathered.as<float>(), stream);
}

}  // namespace foretoken::worker
