#include "worker/prefill.h"

#include <algorithm>

#include "common/check.h"
#include "kernels/row_tiles.h"
#include "worker/nvme_reads.h"

namespace foretoken::worker {
namespace {

std::byte* at(const kernels::DeviceBuffer& buffer, std::size_t offset) {
  return buffer.as<std::byte>() + offset;
}

int tail_rows(const Sequence& sequence) {
  return std::min(kernels::kHistoryRows, sequence.prompt_length() - sequence.reused_tokens);
}

// What warm_up() tries after so many rows: decode's kernels have few.
int next_size(int rows) {
  return rows < 8 ? std::max(1, 2 * rows) : kernels::round_to_tiles(rows + 1);
}

}  // namespace

Prefill::Prefill(Model& model, kernels::Device& device, kvstore::KvStore& store,
                 predictor::Policy& policy, int max_rows, int max_tokens)
    : model_(model),
      device_(device),
      store_(store),
      policy_(policy),
      max_tokens_(max_tokens),
      attention_(attention_shape(model.config(), model.partition(), max_rows, max_tokens)),
      act_(device, model.config(), model.partition(), max_rows, 1),
      lse_(device,
           sizeof(float) * static_cast<std::size_t>(model.partition().heads.count * max_rows),
           kernels::MemoryUse::kActivations),
      copy_(device.make_stream(kernels::StreamKind::kCopy)),
      load_(device.make_stream(kernels::StreamKind::kCopy)),
      computed_(device.make_event()) {
  act_.begins_sums = true;
  constexpr auto kUse = kernels::MemoryUse::kPrefill;
  const kernels::KvShape& shape = model_.kv_shape();
  const auto heads = static_cast<std::size_t>(model_.partition().heads.count);
  const auto head_dim = static_cast<std::size_t>(shape.head_dim);
  const std::size_t kv = shape.element_bytes() * static_cast<std::size_t>(shape.num_kv_heads) *
                         static_cast<std::size_t>(max_tokens) * head_dim;
  hidden_ = {device_, model_.hidden_bytes(max_tokens), kUse};
  for (LayerKv& layer : kv_)
    layer = {{device_, kv, kUse},
             {device_, kv, kUse},
             device_.make_event(),
             device_.make_event(),
             device_.make_event()};
  if (!device_.runs_at_once()) {
    // What lies behind a prompt's tokens weighs nothing, unless it is no number.
    for (LayerKv& layer : kv_) device_.fill_zero(layer.v.data(), kv, *copy_);
    copy_->synchronize();
  }
  if (!policy_.observes()) return;
  const std::size_t rows = kernels::kHistoryRows;
  const auto columns = static_cast<std::size_t>(blocks_for(max_tokens));
  const std::size_t activation = kernels::bytes_of(device_.activation_type());
  tail_q_ = {device_, activation * rows * heads * head_dim, kUse};
  tail_lse_ = {device_, sizeof(float) * heads * rows, kUse};
  block_max_ = {device_, sizeof(float) * heads * rows * columns, kUse};
}

kernels::PrefillShape Prefill::attention_shape(const ModelConfig& config, const Partition& part,
                                               int max_rows, int max_tokens) {
  const kernels::KvShape kv = Model::kv_shape(config, part);
  return {.kv_type = kv.kv_type,
          .scratch_tokens = max_tokens,
          .max_rows = max_rows,
          .num_heads = part.heads.count,
          .num_kv_heads = kv.num_kv_heads,
          .head_dim = kv.head_dim,
          .scale = Model::attention_scale(config),
          .with_lse = true};
}

void Prefill::drain() {
  copy_->synchronize();
  load_->synchronize();
}

void* Prefill::hidden_at(const Sequence& sequence, int token) const {
  return at(hidden_, model_.hidden_bytes(token - sequence.reused_tokens));
}

void Prefill::warm_up(kernels::Stream& stream) {
  if (device_.runs_at_once()) return;  // a CPU has all of its kernels
  const int max_rows = act_.max_rows;
  const auto attend_zeros = [&](int begin, int rows) {  // nothing else gets into the scratch
    device_.fill_zero(act_.qkv.data(), act_.qkv.bytes(), stream);
    attend_chunk(0, begin, rows, stream);
  };
  for (int rows = 0; rows < max_rows;) {
    rows = std::min(next_size(rows), max_rows);
    attend_zeros(0, rows);
    device_.fill_zero(hidden_.data(), model_.hidden_bytes(rows), stream);
    model_.try_products(0, rows, act_, hidden_.data(), stream);
  }
  // Whole chunks have attention of their own. Far behind, they take longer than it is to load.
  constexpr int kMostTokens = 131072;
  for (int end = max_rows; end <= std::min(max_tokens_, kMostTokens); end += max_rows) {
    attend_zeros(end - max_rows, max_rows);
  }
}

void Prefill::begin(Sequence& sequence, kernels::Stream& stream) {
  current_ = sequence.id();
  next_layer_ = 0;
  next_token_ = sequence.reused_tokens;
  const int length = sequence.prompt_length();
  sequence.make_prompt_resident(stream);
  for (int token = sequence.reused_tokens; token < length; token += act_.max_rows) {
    const int rows = std::min(act_.max_rows, length - token);
    model_.embed(sequence.kv().tokens + token, rows, hidden_at(sequence, token), stream);
  }
}

void Prefill::check_order(const Sequence& sequence, const PrefillItem& item) const {
  const int length = sequence.prompt_length();
  const bool whole_layers = item.token_begin == sequence.reused_tokens && item.token_end == length;
  const bool in_order = current_ == sequence.id() && item.layer_begin == next_layer_ &&
                        item.token_begin == next_token_ && item.token_end > item.token_begin &&
                        item.token_end <= length && item.layer_end > item.layer_begin &&
                        item.layer_end <= model_.num_layers() &&
                        (whole_layers || item.layer_end == item.layer_begin + 1);
  if (in_order) return;
  throw Exception(ErrorCode::kInternal,
                  "prefill item of layers " + std::to_string(item.layer_begin) + ".." +
                      std::to_string(item.layer_end) + ", tokens " +
                      std::to_string(item.token_begin) + ".." + std::to_string(item.token_end) +
                      " of sequence " + std::to_string(raw(sequence.id())) + " is out of order");
}

bool Prefill::run(Sequence& sequence, const PrefillItem& item, kernels::Stream& stream) {
  if (item.layer_begin == 0 && item.token_begin == sequence.reused_tokens) {
    begin(sequence, stream);
  }
  check_order(sequence, item);
  for (int layer = item.layer_begin; layer < item.layer_end; ++layer) {
    run_layer(sequence, layer, static_cast<int>(item.token_begin), static_cast<int>(item.token_end),
              stream);
  }
  model_.end_sums(stream);
  const bool layer_done = item.token_end == sequence.prompt_length();
  next_layer_ = layer_done ? item.layer_end : item.layer_begin;
  next_token_ = layer_done ? sequence.reused_tokens : static_cast<int>(item.token_end);
  if (next_layer_ < model_.num_layers()) return false;
  for (LayerKv& layer : kv_) layer.packed->wait(stream);  // decode reads the slots
  current_.reset();
  return true;
}

void Prefill::run_layer(Sequence& sequence, int layer, int begin, int end,
                        kernels::Stream& stream) {
  if (begin == sequence.reused_tokens) {
    kv_of(layer).packed->wait(stream);  // what this layer overwrites
    if (begin > 0) begin_on_prefix(sequence, layer, stream);
  }
  for (int chunk = begin; chunk < end; chunk += act_.max_rows) {
    run_chunk(sequence, layer, chunk, std::min(act_.max_rows, end - chunk), stream);
    if (sequence.outsized() != nullptr) sequence.outsized()->advance();
  }
  if (end < sequence.prompt_length()) return;
  write_blocks(sequence, layer, stream);
  if (policy_.observes()) start_history(sequence, layer, stream);
  if (sequence.keeps_sketches()) sketch_keys(sequence, layer, stream);
  kv_of(layer).done->record(stream);
}

// The next layer's prefix is on its way while this one is computed. Not an outsized sequence's: its
// tables may change only while no op reads them.
void Prefill::begin_on_prefix(Sequence& sequence, int layer, kernels::Stream& stream) {
  const bool loads_ahead = sequence.outsized() == nullptr;
  if (layer == 0 || !loads_ahead) load_prefix(sequence, layer);
  kv_of(layer).loaded->wait(stream);
  if (loads_ahead && layer + 1 < model_.num_layers()) load_prefix(sequence, layer + 1);
}

void Prefill::run_chunk(Sequence& sequence, int layer, int begin, int rows,
                        kernels::Stream& stream) {
  void* hidden = hidden_at(sequence, begin);
  model_.project_qkv(layer, rows, act_, hidden, stream);
  attend_chunk(layer, begin, rows, stream);
  if (policy_.observes()) keep_tail(sequence, begin, rows, stream);
  model_.finish_layer(layer, rows, act_, hidden, stream);
}

void Prefill::attend_chunk(int layer, int begin, int rows, kernels::Stream& stream) {
  kernels::RopePrefillArgs rope{};
  static_cast<kernels::RopeArgs&>(rope) = model_.rope_args(layer, rows, act_);
  rope.begin = begin;
  rope.kv_type = model_.kv_shape().kv_type;
  rope.k_out = kv_of(layer).k.data();
  rope.v_out = kv_of(layer).v.data();
  rope.scratch_tokens = max_tokens_;
  device_.rope_prefill(rope, stream);

  device_.prefill_attention({.q = act_.q.data(),
                             .k = kv_of(layer).k.data(),
                             .v = kv_of(layer).v.data(),
                             .kv_type = attention_.kv_type,
                             .scratch_tokens = attention_.scratch_tokens,
                             .begin = begin,
                             .rows = rows,
                             .max_rows = attention_.max_rows,
                             .num_heads = attention_.num_heads,
                             .num_kv_heads = attention_.num_kv_heads,
                             .head_dim = attention_.head_dim,
                             .scale = attention_.scale,
                             .out = act_.attn.data(),
                             .lse = lse_.as<float>()},
                            stream);
}

// Copies what of the chunk belongs to the last queries: their q, and their LSE by head.
void Prefill::keep_tail(Sequence& sequence, int begin, int rows, kernels::Stream& stream) {
  const int tail = tail_rows(sequence);
  const int tail_begin = sequence.prompt_length() - tail;
  const int first = std::max(begin, tail_begin);
  const int count = begin + rows - first;
  if (count <= 0) return;
  const int heads = model_.partition().heads.count;
  const std::size_t q_row = kernels::bytes_of(device_.activation_type()) *
                            static_cast<std::size_t>(heads * model_.kv_shape().head_dim);
  device_.copy(at(tail_q_, q_row * static_cast<std::size_t>(first - tail_begin)),
               at(act_.q, q_row * static_cast<std::size_t>(first - begin)),
               q_row * static_cast<std::size_t>(count), stream);
  for (int head = 0; head < heads; ++head) {
    device_.copy(tail_lse_.as<float>() + head * tail + (first - tail_begin),
                 lse_.as<float>() + head * act_.max_rows + (first - begin),
                 sizeof(float) * static_cast<std::size_t>(count), stream);
  }
}

void Prefill::load_prefix(Sequence& sequence, int layer) {
  const kernels::KvShape& shape = model_.kv_shape();
  const int blocks = sequence.reused_tokens / kBlockTokens;
  if (kvstore::OutsizedKv* outsized = sequence.outsized()) {
    await_prefix(*outsized, layer, sequence.reused_tokens);
  }
  LayerKv& kv = kv_of(layer);
  kv.done->wait(*load_);
  kv.packed->wait(*load_);
  store_.unpack({.k = kv.k.data(),
                 .v = kv.v.data(),
                 .scratch_tokens = max_tokens_,
                 .num_kv_heads = shape.num_kv_heads,
                 .head_dim = shape.head_dim,
                 .layer = layer,
                 .first_block = 0,
                 .num_blocks = blocks,
                 .sequence = sequence.alone().sequences},
                *load_);
  kv.loaded->record(*load_);
  if (sequence.outsized() != nullptr) read_next_prefix(sequence, layer);
}

// A lost sequence goes on with what there is; status() says so.
void Prefill::await_prefix(kvstore::OutsizedKv& outsized, int layer, int tokens) {
  const auto begin = std::chrono::steady_clock::now();
  if (!outsized.wait(layer, kvstore::Segments{0, tokens / kSegmentTokens})) return;
  reading_.tokens += tokens;
  reading_.time += std::chrono::steady_clock::now() - begin;
}

// The layer's reused runs are in the scratch soon, and may leave their frames: the disk brings the
// next layer's while this one is computed.
void Prefill::read_next_prefix(Sequence& sequence, int layer) {
  kvstore::OutsizedKv& outsized = *sequence.outsized();
  Sequence* row = &sequence;
  work_until(*kv_of(layer).loaded, std::span(&row, 1), device_);
  outsized.let_go(layer);
  if (layer + 1 == model_.num_layers()) return;
  outsized.ask(layer + 1, kvstore::Segments{0, sequence.reused_tokens / kSegmentTokens});
  outsized.advance();
}

// The layer's blocks leave on the copy stream, while the next layer is computed.
void Prefill::write_blocks(Sequence& sequence, int layer, kernels::Stream& stream) {
  computed_->record(stream);
  computed_->wait(*copy_);
  const kernels::KvShape& shape = model_.kv_shape();
  const int length = sequence.prompt_length();
  const int reused_blocks = sequence.reused_tokens / kBlockTokens;
  kvstore::OutsizedKv* outsized = sequence.outsized();
  kernels::PackBlocksArgs pack{
      .k = kv_of(layer).k.data(),
      .v = kv_of(layer).v.data(),
      .scratch_tokens = max_tokens_,
      .num_kv_heads = shape.num_kv_heads,
      .head_dim = shape.head_dim,
      .layer = layer,
      .first_block = 0,
      .num_blocks = reused_blocks,
      .num_tokens = length,
      .to_arena = false,
      .sequence = sequence.alone().sequences,
      .host_slabs = outsized == nullptr ? sequence.reservation().slabs.data() : nullptr,
      .max_segments = sequence.kv().max_segments,
      .host_runs = outsized == nullptr ? nullptr : outsized->runs_of(layer)};
  if (reused_blocks > 0) store_.pack(pack, *copy_);  // to slots alone: the arena has them
  pack.first_block = reused_blocks;
  pack.num_blocks = blocks_for(length) - reused_blocks;
  pack.to_arena = model_.partition().writes_kv || outsized != nullptr;
  const int reused = reused_blocks / kSegmentBlocks;
  if (outsized != nullptr && !outsized->make_room(layer, {reused, segments_for(length)})) {
    pack.to_arena = false;  // the sequence is lost: status() says so
  }
  store_.pack(pack, *copy_);
  kv_of(layer).packed->record(*copy_);
  if (outsized == nullptr) return;
  Sequence* row = &sequence;
  work_until(*kv_of(layer).packed, std::span(&row, 1), device_);  // what leaves for NVMe is whole
  outsized->let_go(layer);
  outsized->fill(layer, {reused, length / kSegmentTokens});
}

// The history's first rows: the last queries' attention over the whole prompt.
void Prefill::start_history(Sequence& sequence, int layer, kernels::Stream& stream) {
  const kernels::KvShape& shape = model_.kv_shape();
  const int length = sequence.prompt_length();
  const int tail = tail_rows(sequence);
  const int columns = blocks_for(length);
  device_.prefill_block_max({.q = tail_q_.data(),
                             .k = kv_of(layer).k.data(),
                             .kv_type = shape.kv_type,
                             .scratch_tokens = max_tokens_,
                             .begin = length - tail,
                             .rows = tail,
                             .num_heads = model_.partition().heads.count,
                             .num_kv_heads = shape.num_kv_heads,
                             .head_dim = shape.head_dim,
                             .scale = model_.attention_scale(),
                             .block_max = block_max_.as<float>(),
                             .pitch = columns},
                            stream);
  policy_.observe_prefill(sequence.alone().histories, layer,
                          {.block_max = block_max_.as<float>(),
                           .lse = tail_lse_.as<float>(),
                           .rows = tail,
                           .pitch = columns,
                           .num_columns = sequence.prompt_columns()},
                          stream);
}

// Of the reused prefix too, whose keys are in the scratch as the others are.
void Prefill::sketch_keys(Sequence& sequence, int layer, kernels::Stream& stream) {
  device_.sketch_blocks({.k = kv_of(layer).k.data(),
                         .scratch_tokens = max_tokens_,
                         .num_kv_heads = model_.kv_shape().num_kv_heads,
                         .layer = layer,
                         .num_blocks = sequence.prompt_length() / kBlockTokens,
                         .sequence = sequence.alone().sequences},
                        stream);
}

const void* Prefill::last_token(const Sequence& sequence) const {
  return hidden_at(sequence, sequence.prompt_length() - 1);
}

}  // namespace foretoken::worker
