#include "worker/prefill.h"

#include <algorithm>

#include "common/check.h"

namespace foretoken::worker {
namespace {

std::byte* at(const kernels::DeviceBuffer& buffer, std::size_t offset) {
  return buffer.as<std::byte>() + offset;
}

int tail_rows(const Sequence& sequence) {
  return std::min(kernels::kHistoryRows, sequence.prompt_length() - sequence.reused_tokens);
}

}  // namespace

Prefill::Prefill(Model& model, kernels::Device& device, kvstore::KvStore& store,
                 predictor::Policy& policy, int max_rows)
    : model_(model),
      device_(device),
      store_(store),
      policy_(policy),
      act_(device, model.config(), model.partition(), max_rows),
      lse_(device,
           sizeof(float) * static_cast<std::size_t>(model.partition().heads.count * max_rows),
           kernels::MemoryUse::kActivations),
      num_columns_(device, sizeof(std::int32_t), kernels::MemoryUse::kActivations) {}

void Prefill::start(Sequence& sequence, int reused_tokens, kernels::Stream& stream) {
  const int length = sequence.prompt_length();
  FT_CHECK(reused_tokens >= 0 && reused_tokens < length, reused_tokens, length);
  sequence.reused_tokens = reused_tokens;
  sequence.make_prompt_resident(stream);
  const kernels::KvShape& shape = model_.kv_shape();
  const auto heads = static_cast<std::size_t>(model_.partition().heads.count);
  const std::size_t residual = model_.residual_bytes(length - reused_tokens);
  const std::size_t kv = shape.element_bytes() * static_cast<std::size_t>(shape.num_kv_heads) *
                         static_cast<std::size_t>(length) *
                         static_cast<std::size_t>(shape.head_dim);
  const std::size_t activation = kernels::bytes_of(device_.activation_type());
  constexpr auto kUse = kernels::MemoryUse::kPrefill;
  auto scratch = std::make_unique<PrefillScratch>();
  scratch->hidden = {device_, residual, kUse};
  scratch->delta = {device_, residual, kUse};
  scratch->k = {device_, kv, kUse};
  scratch->v = {device_, kv, kUse};
  if (policy_.observes()) {
    const std::size_t rows = kernels::kHistoryRows;
    const auto columns = static_cast<std::size_t>(blocks_for(length));
    scratch->tail_q = {device_,
                       activation * rows * heads * static_cast<std::size_t>(shape.head_dim), kUse};
    scratch->tail_lse = {device_, sizeof(float) * heads * rows, kUse};
    scratch->block_max = {device_, sizeof(float) * heads * rows * columns, kUse};
  }
  scratch->token = reused_tokens;
  sequence.prefill = std::move(scratch);
  for (int begin = reused_tokens; begin < length; begin += act_.max_rows) {
    const int rows = std::min(act_.max_rows, length - begin);
    const std::size_t offset = model_.residual_bytes(begin - reused_tokens);
    model_.embed(std::span(sequence.tokens)
                     .subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(rows)),
                 act_, {at(sequence.prefill->hidden, offset), at(sequence.prefill->delta, offset)},
                 stream);
  }
}

bool Prefill::run(Sequence& sequence, const PrefillItem& item, kernels::Stream& stream) {
  PrefillScratch* scratch = sequence.prefill.get();
  const int length = sequence.prompt_length();
  const int begin = static_cast<int>(item.token_begin);
  const int end = static_cast<int>(item.token_end);
  const bool in_order = scratch != nullptr && item.layer_begin == scratch->layer &&
                        begin == scratch->token && end > begin && end <= length &&
                        item.layer_end > item.layer_begin &&
                        item.layer_end <= model_.num_layers() &&
                        (item.layer_end == item.layer_begin + 1 ||
                         (begin == sequence.reused_tokens && end == length));
  if (!in_order) {
    throw Exception(ErrorCode::kInternal,
                    "prefill item of layers " + std::to_string(item.layer_begin) + ".." +
                        std::to_string(item.layer_end) + ", tokens " + std::to_string(begin) +
                        ".." + std::to_string(end) + " is out of order");
  }
  for (int layer = item.layer_begin; layer < item.layer_end; ++layer) {
    run_layer(sequence, layer, begin, end, stream);
  }
  const bool layer_done = end == length;
  scratch->layer = layer_done ? item.layer_end : item.layer_begin;
  scratch->token = layer_done ? sequence.reused_tokens : end;
  return scratch->layer == model_.num_layers();
}

void Prefill::run_layer(Sequence& sequence, int layer, int begin, int end,
                        kernels::Stream& stream) {
  if (begin == sequence.reused_tokens && begin > 0) load_prefix(sequence, layer, stream);
  for (int chunk = begin; chunk < end; chunk += act_.max_rows) {
    run_chunk(sequence, layer, chunk, std::min(act_.max_rows, end - chunk), stream);
  }
  if (end == sequence.prompt_length()) finish_layer(sequence, layer, stream);
}

void Prefill::run_chunk(Sequence& sequence, int layer, int begin, int rows,
                        kernels::Stream& stream) {
  PrefillScratch& scratch = *sequence.prefill;
  const std::size_t offset = model_.residual_bytes(begin - sequence.reused_tokens);
  const Residual x{at(scratch.hidden, offset), at(scratch.delta, offset)};
  model_.project_qkv(layer, rows, act_, x, stream);

  kernels::RopePrefillArgs rope{};
  static_cast<kernels::RopeArgs&>(rope) = model_.rope_args(layer, rows, act_);
  rope.begin = begin;
  rope.kv_type = model_.kv_shape().kv_type;
  rope.k_out = scratch.k.data();
  rope.v_out = scratch.v.data();
  rope.scratch_tokens = sequence.prompt_length();
  device_.rope_prefill(rope, stream);

  device_.prefill_attention({.q = act_.q.data(),
                             .k = scratch.k.data(),
                             .v = scratch.v.data(),
                             .kv_type = model_.kv_shape().kv_type,
                             .scratch_tokens = sequence.prompt_length(),
                             .begin = begin,
                             .rows = rows,
                             .num_heads = model_.partition().heads.count,
                             .num_kv_heads = model_.kv_shape().num_kv_heads,
                             .head_dim = model_.kv_shape().head_dim,
                             .scale = model_.attention_scale(),
                             .out = act_.attn.data(),
                             .lse = lse_.as<float>()},
                            stream);
  if (policy_.observes()) keep_tail(sequence, begin, rows, stream);
  model_.finish_layer(layer, rows, act_, x, stream);
}

// Copies what of the chunk belongs to the last queries: their q, and their LSE by head.
void Prefill::keep_tail(Sequence& sequence, int begin, int rows, kernels::Stream& stream) {
  PrefillScratch& scratch = *sequence.prefill;
  const int tail = tail_rows(sequence);
  const int tail_begin = sequence.prompt_length() - tail;
  const int first = std::max(begin, tail_begin);
  const int count = begin + rows - first;
  if (count <= 0) return;
  const int heads = model_.partition().heads.count;
  const std::size_t q_row = kernels::bytes_of(device_.activation_type()) *
                            static_cast<std::size_t>(heads * model_.kv_shape().head_dim);
  device_.copy(at(scratch.tail_q, q_row * static_cast<std::size_t>(first - tail_begin)),
               at(act_.q, q_row * static_cast<std::size_t>(first - begin)),
               q_row * static_cast<std::size_t>(count), stream);
  for (int head = 0; head < heads; ++head) {
    device_.copy(scratch.tail_lse.as<float>() + head * tail + (first - tail_begin),
                 lse_.as<float>() + head * rows + (first - begin),
                 sizeof(float) * static_cast<std::size_t>(count), stream);
  }
}

void Prefill::load_prefix(Sequence& sequence, int layer, kernels::Stream& stream) {
  PrefillScratch& scratch = *sequence.prefill;
  const kernels::KvShape& shape = model_.kv_shape();
  const int blocks = sequence.reused_tokens / kBlockTokens;
  store_.unpack({.k = scratch.k.data(),
                 .v = scratch.v.data(),
                 .scratch_tokens = sequence.prompt_length(),
                 .num_kv_heads = shape.num_kv_heads,
                 .head_dim = shape.head_dim,
                 .layer = layer,
                 .first_block = 0,
                 .num_blocks = blocks,
                 .sequence = sequence.alone().sequences,
                 .mismatches = nullptr},
                stream);
}

void Prefill::finish_layer(Sequence& sequence, int layer, kernels::Stream& stream) {
  PrefillScratch& scratch = *sequence.prefill;
  const kernels::KvShape& shape = model_.kv_shape();
  const int length = sequence.prompt_length();
  const int reused_blocks = sequence.reused_tokens / kBlockTokens;
  kernels::PackBlocksArgs pack{.k = scratch.k.data(),
                               .v = scratch.v.data(),
                               .scratch_tokens = length,
                               .num_kv_heads = shape.num_kv_heads,
                               .head_dim = shape.head_dim,
                               .layer = layer,
                               .first_block = 0,
                               .num_blocks = reused_blocks,
                               .num_tokens = length,
                               .to_arena = false,
                               .sequence = sequence.alone().sequences};
  if (reused_blocks > 0) store_.pack(pack, stream);  // to slots alone: the arena has them
  pack.first_block = reused_blocks;
  pack.num_blocks = blocks_for(length) - reused_blocks;
  pack.to_arena = model_.partition().writes_kv;
  store_.pack(pack, stream);

  if (!policy_.observes()) return;
  const int tail = tail_rows(sequence);
  const int columns = blocks_for(length);
  device_.prefill_block_max({.q = scratch.tail_q.data(),
                             .k = scratch.k.data(),
                             .kv_type = shape.kv_type,
                             .scratch_tokens = length,
                             .begin = length - tail,
                             .rows = tail,
                             .num_heads = model_.partition().heads.count,
                             .num_kv_heads = shape.num_kv_heads,
                             .head_dim = shape.head_dim,
                             .scale = model_.attention_scale(),
                             .block_max = scratch.block_max.as<float>(),
                             .pitch = columns},
                            stream);
  device_.copy_in(num_columns_.data(), &columns, sizeof columns, stream);
  policy_.observe_prefill(sequence.alone().histories, layer,
                          {.block_max = scratch.block_max.as<float>(),
                           .lse = scratch.tail_lse.as<float>(),
                           .rows = tail,
                           .pitch = columns,
                           .num_columns = num_columns_.as<std::int32_t>(),
                           .by_slot = false},
                          stream);
  stream.synchronize();  // `columns` ends here
}

Residual Prefill::last_token(Sequence& sequence) const {
  const std::size_t offset =
      model_.residual_bytes(sequence.prompt_length() - sequence.reused_tokens - 1);
  return {at(sequence.prefill->hidden, offset), at(sequence.prefill->delta, offset)};
}

}  // namespace foretoken::worker
