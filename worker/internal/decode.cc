#include "worker/decode.h"

#include <algorithm>
#include <numeric>

#include "common/check.h"
#include "worker/internal/fetch_groups.h"
#include "worker/pinned.h"

namespace foretoken::worker {
namespace {

// Kinds of steps, of about a MB of the device each (guessed). More than the sets of calibrating
// layers that come in turn, which are as many as layers at most.
constexpr std::size_t kMaxRecorded = 256;

kernels::DeviceBuffer floats(kernels::Device& device, std::int64_t count) {
  return {device, sizeof(float) * static_cast<std::size_t>(count),
          kernels::MemoryUse::kActivations};
}

// With as many chosen as there are, the network does not run (kernels: is_scored).
void choose_nothing(kernels::HistoryState& history) {
  history.top_k = history.max_columns;
  history.max_per_head = 0;
}

bool any_outsized(std::span<Sequence* const> rows) {
  return std::ranges::any_of(rows, [](const Sequence* row) { return row->outsized() != nullptr; });
}

}  // namespace

// The batch as arrays [max_rows], staged in pinned memory and copied to the device as one.
struct Decode::Tables {
  struct Rows {
    kernels::SequenceKv* sequences;
    kernels::HistoryState* histories;
    kernels::Selection* selections;
    kernels::FetchList* fetches;
    std::int32_t* num_columns;
    std::size_t bytes;
  };
  // A step may still be read from the last staging while the next one is written.
  static constexpr int kStagings = 3;

  Tables(kernels::Device& on, int rows)
      : max_rows(static_cast<std::size_t>(rows)),
        memory(on, lay_out(nullptr).bytes, kernels::MemoryUse::kTables),
        device(lay_out(memory.as<std::byte>())) {
    for (int i = 0; i < kStagings; ++i) {
      staged.push_back(std::make_unique<PinnedArray<std::byte>>(on, device.bytes));
      copied.push_back(on.make_event());
    }
  }

  // With a null base it only counts.
  Rows lay_out(std::byte* base) const {
    std::size_t used = 0;
    const auto take = [&]<typename T>(T*& part) {
      part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
      used += (max_rows * sizeof(T) + 63) / 64 * 64;
    };
    Rows rows{};
    take(rows.sequences);
    take(rows.histories);
    take(rows.selections);
    take(rows.fetches);
    take(rows.num_columns);
    rows.bytes = used;
    return rows;
  }

  std::size_t max_rows;
  kernels::DeviceBuffer memory;
  Rows device;
  std::vector<std::unique_ptr<PinnedArray<std::byte>>> staged;
  std::vector<std::unique_ptr<kernels::Event>> copied;
  std::size_t next = 0;
};

Decode::Decode(const DecodeConfig& config, Model& model, kernels::Device& device,
               kvstore::KvStore& store, predictor::Policy& policy, Sampler& sampler)
    : config_(config),
      model_(model),
      device_(device),
      store_(store),
      policy_(policy),
      sampler_(sampler),
      copy_(device.make_stream(kernels::StreamKind::kCopy)),
      side_(device.make_stream(kernels::StreamKind::kCompute)),
      resolved_(device.make_event()),
      written_(device.make_event()),
      advanced_(device.make_event()),
      chosen_(device.make_event()),
      listed_(device.make_event()),
      act_(device, model.config(), model.partition(), config.max_rows, config.max_rows),
      hidden_(device, model.hidden_bytes(config.max_rows), kernels::MemoryUse::kActivations),
      logits_(floats(device, config.max_rows * model.config().vocab_size)),
      lse_(floats(device, std::int64_t{model.num_layers()} * config.max_rows *
                              model.partition().heads.count)),
      exact_lse_(floats(device, model.partition().heads.count)),
      exact_pitch_(blocks_for(config.max_model_len)),
      tables_(std::make_unique<Tables>(device, config.max_rows)),
      recorded_(kMaxRecorded),
      nvme_reads_(config.on_late) {
  if (policy.spills()) {
    const kernels::KvShape& shape = model.kv_shape();
    kept_ = {device,
             shape.block_bytes() *
                 static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads * kLocalBlocks),
             kernels::MemoryUse::kActivations};
  }
  exact_max_ = floats(device, std::int64_t{model.partition().heads.count} * exact_pitch_);
  if (config.audit_every > 0) {
    dense_logits_ = floats(device, config.max_rows * model.config().vocab_size);
  }
  batch_ = {.rows = 0,
            .sequences = tables_->device.sequences,
            .histories = tables_->device.histories,
            .selections = tables_->device.selections};
}

Decode::~Decode() = default;

void Decode::begin(Sequence& sequence, kernels::Stream& compute) {
  if (!sequence.is_dense()) policy_.select_ahead(sequence.alone(), compute);
  device_.resolve({.sequences = sequence.alone().sequences,
                   .selections = sequence.alone().selections,
                   .fetches = sequence.fetches_alone(),
                   .rows = 1,
                   .first_layer = 0,
                   .num_layers = model_.num_layers()},
                  compute);
  if (sequence.outsized() == nullptr) return;
  if (!sequence.is_dense()) sequence.copy_fetches(compute);
  listed_->record(compute);
}

void Decode::spill(Sequence& sequence, kernels::Stream& compute) {
  sequence.spill(policy_, kept_, compute);
  if (sequence.decodes()) begin(sequence, compute);  // else that is to come
}

void Decode::drain() { copy_->synchronize(); }

Decode::Kind Decode::kind_of(std::span<Sequence* const> rows) const {
  Kind kind{.rows = static_cast<int>(rows.size())};
  kind.streams_all = std::ranges::any_of(rows, &Sequence::streams_all);
  const bool chooses = policy_.selected_per_head().has_value();
  kind.fetches_blocks =
      kind.streams_all || (chooses && !std::ranges::all_of(rows, &Sequence::is_dense));
  kind.scores_segments = any_outsized(rows);
  kind.first_calibrated = rows.empty() ? 0 : first_calibrated(*rows.front());
  return kind;
}

void Decode::bind(std::span<Sequence* const> rows, kernels::Stream& compute) {
  FT_CHECK(static_cast<int>(rows.size()) <= config_.max_rows, rows.size(), config_.max_rows);
  rows_.assign(rows.begin(), rows.end());
  batch_.rows = static_cast<int>(rows.size());
  kind_ = kind_of(rows);
  batch_.scores_segments = kind_.scores_segments;
  choose_dense();
  const std::size_t staging = tables_->next++ % Tables::kStagings;
  tables_->copied[staging]->synchronize();  // three steps ago: long since
  std::byte* base = tables_->staged[staging]->data();
  const Tables::Rows host = tables_->lay_out(base);
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    host.sequences[i] = rows_[i]->kv();
    host.histories[i] = rows_[i]->policy_state().history;
    host.selections[i] = rows_[i]->policy_state().selection;
    host.fetches[i] = rows_[i]->fetches();
    host.num_columns[i] = blocks_for(rows_[i]->length());  // the step's token included
    if (rows_[i]->is_dense()) choose_nothing(host.histories[i]);
  }
  device_.read_in(tables_->memory.data(), base, host.bytes, compute);
  tables_->copied[staging]->record(compute);
}

Sampler::Draw* Decode::step(std::span<Sequence* const> rows, kernels::Stream& compute) {
  await_last_step(rows);
  bind(rows, compute);
  Sampler::Draw* draw = sampler_.begin(rows, compute);
  by_layer_ = outsized_ && brings_by_layer();
  run(compute);
  sampler_.end(*draw, compute);
  if (outsized_ && !device_.runs_at_once()) {
    list_fetches(compute);
    for (Sequence* row : rows_) nvme_reads_.start(*row);
  }
  for (int row = 0; row < batch_.rows; ++row) {
    if (audits(*rows_[static_cast<std::size_t>(row)])) measure_kl(row, compute);
  }
  for (Sequence* row : rows_) {
    count_calibration_bytes(*row);
    ++row->decode_steps;
  }
  return draw;
}

// Of an outsized row: from here on no op in flight reads its KV in the arena, and its fetch lists
// are with the host. REQUIRES: lengths are not grown for the step yet.
void Decode::await_last_step(std::span<Sequence* const> rows) {
  outsized_ = any_outsized(rows);
  if (!outsized_) return;
  work_until(*listed_, rows, device_);
  for (Sequence* row : rows) nvme_reads_.turn_segment(*row);
}

// Attention that streams all blocks needs a whole layer of the KV in memory, and so the host beside
// each layer.
bool Decode::streams_somewhere() const {
  if (kind_.streams_all || policy_.selects_at_query() || !dense_heads_.empty()) return true;
  const bool reads_keys = policy_.calibration() == predictor::Calibration::kExact;
  return std::ranges::any_of(rows_, [&](const Sequence* row) {
    return audits(*row) || (reads_keys && first_calibrated(*row) < model_.num_layers());
  });
}

// Else all that the step reads is in memory now.
bool Decode::brings_by_layer() {
  if (device_.runs_at_once()) return true;  // the disk was asked when the step was chosen
  const bool has_room = nvme_reads_.ask_step(rows_);
  if (streams_somewhere() || !has_room) return true;
  nvme_reads_.bring_step(rows_);
  return false;
}

void Decode::list_fetches(kernels::Stream& stream) {
  for (Sequence* row : rows_) {
    if (row->outsized() != nullptr && !row->is_dense()) row->copy_fetches(stream);
  }
  listed_->record(stream);
}

void Decode::run(kernels::Stream& compute) {
  if (!recordable()) return forward(compute);
  recorded_.run(kind_, device_, compute, [this, &compute] { forward(compute); });
}

// Whether the step is the same for whatever sequences the batch holds. All ranks must say the same,
// since NCCL wants a sum recorded by all of them or by none; but which heads are dense is a rank's
// own, and so is what its frames have room for.
bool Decode::recordable() const {
  const bool differs_by_rank = config_.min_recall > 0 || outsized_;
  if (differs_by_rank && model_.partition().world_size > 1) return false;
  if (!dense_heads_.empty()) return false;
  if (!config_.record || device_.runs_at_once() || policy_.selects_at_query()) return false;
  if (by_layer_) return false;
  return std::ranges::none_of(rows_, [&](const Sequence* row) {
    return audits(*row) || first_calibrated(*row) != kind_.first_calibrated;
  });
}

void Decode::forward(kernels::Stream& compute) {
  audits_ = std::ranges::any_of(rows_, [this](const Sequence* row) { return audits(*row); });
  if (kind_.fetches_blocks && !by_layer_) start_fetches(compute);
  // An audit's dense pass would give the disk time that other steps don't: it comes after.
  for (int layer = 0; kind_.fetches_blocks && by_layer_ && audits_ && layer < model_.num_layers();
       ++layer) {
    fetch_now(layer, compute);
  }
  for (int row = 0; row < batch_.rows; ++row) {
    if (audits(*rows_[static_cast<std::size_t>(row)])) dense_pass(row, compute);
  }
  model_.embed_next(batch_.sequences, batch_.rows, hidden_.data(), compute);
  model_.project_qkv(0, batch_.rows, act_, hidden_.data(), compute);
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    attend_layer(layer, compute);
    if (layer + 1 == model_.num_layers()) end_attention(compute);
    model_.finish_layer_and_next(layer, batch_.rows, act_, hidden_.data(), logits_.as<float>(),
                                 compute);
  }
  sampler_.run(logits_.as<float>(), batch_.rows, compute);
  chosen_->wait(compute);  // the step's end: slots and lengths may change
}

void Decode::start_fetches(kernels::Stream& compute) {
  resolved_->record(compute);
  resolved_->wait(*copy_);
  for (int layer = 0; layer < model_.num_layers();) {
    const int count = layers_to_fetch(device_, layer, model_.num_layers());
    store_.fetch(layer, count, batch_.sequences, tables_->device.fetches, batch_.rows, *copy_);
    layer += count;
  }
}

// The layer's gather, in line: what it brings is needed now.
void Decode::fetch_now(int layer, kernels::Stream& compute) {
  for (Sequence* row : rows_) nvme_reads_.bring(*row, layer);
  store_.fetch(layer, 1, batch_.sequences, tables_->device.fetches, batch_.rows, compute);
  if (outsized_) compute.synchronize();  // what is let go may give way
  for (Sequence* row : rows_) nvme_reads_.let_go(*row, layer);
}

// Of the whole step. What the coming one needs is made beside the last layer's products.
void Decode::end_attention(kernels::Stream& compute) {
  device_.advance({.sequences = batch_.sequences, .rows = batch_.rows}, compute);
  advanced_->record(compute);
  write_through();
  choose();
}

// REQUIRES: the layer's q, k and v are projected.
void Decode::attend_layer(int layer, kernels::Stream& compute) {
  if (kind_.fetches_blocks && by_layer_ && !audits_) {
    fetch_now(layer, compute);
  } else if (kind_.fetches_blocks) {
    count_late(layer, compute);
    store_.wait(layer, compute);  // before the step's K and V: the open block may be in flight too
  }
  rope(layer, batch_, compute);
  if (policy_.selects_at_query()) fetch_at_query(layer, compute);
  attend(layer, batch_, compute);
  if (any_calibrates(layer)) observe_calibrated(layer, compute);
  for (int row = 0; row < batch_.rows; ++row) {
    if (audits(*rows_[static_cast<std::size_t>(row)])) measure_recall(layer, row, compute);
  }
  attend_densely(layer, compute);
}

void Decode::rope(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute) {
  kernels::RopeDecodeArgs args{};
  static_cast<kernels::RopeArgs&>(args) = model_.rope_args(layer, batch.rows, act_);
  args.sequences = batch.sequences;
  args.layer = layer;
  device_.rope_decode(args, compute);
}

// The block that the step has filled, beside the rest of the step. REQUIRES: lengths are advanced.
void Decode::write_through() {
  advanced_->wait(*copy_);
  store_.write_through({.sequences = batch_.sequences,
                        .rows = batch_.rows,
                        .to_slabs = model_.partition().writes_kv},
                       *copy_);
  if (policy_.calibration() == predictor::Calibration::kSketch) {
    device_.sketch_filled({.sequences = batch_.sequences, .rows = batch_.rows}, *copy_);
  }
  written_->record(*copy_);
}

// What the coming step shall have. Needs nothing of the token that is being drawn, so it runs
// beside the last products of the step. REQUIRES: write_through() is enqueued.
void Decode::choose() {
  advanced_->wait(*side_);
  if (policy_.observes()) observe_attended(*side_);
  if (kind_.fetches_blocks) policy_.select_ahead(batch_, *side_);
  // Write-through looks the filled block up. Where its bytes failed their check it is absent, and
  // the resolver gives it a slot again: with whatever that slot holds until the gather.
  written_->wait(*side_);
  device_.resolve({.sequences = batch_.sequences,
                   .selections = batch_.selections,
                   .fetches = tables_->device.fetches,
                   .rows = batch_.rows,
                   .first_layer = 0,
                   .num_layers = model_.num_layers()},
                  *side_);
  if (outsized_ && device_.runs_at_once()) {
    list_fetches(*side_);
    for (Sequence* row : rows_) nvme_reads_.ask_ahead(*row);
  }
  chosen_->record(*side_);
}

void Decode::fetch_at_query(int layer, kernels::Stream& compute) {
  for (int row = 0; row < batch_.rows; ++row) {
    score_exactly(layer, row, compute);
    policy_.select_at_query(rows_[static_cast<std::size_t>(row)]->alone(), layer, exact_rows(row),
                            compute);
  }
  device_.resolve({.sequences = batch_.sequences,
                   .selections = batch_.selections,
                   .fetches = tables_->device.fetches,
                   .rows = batch_.rows,
                   .first_layer = layer,
                   .num_layers = 1},
                  compute);
  if (outsized_) {
    list_fetches(compute);
    compute.synchronize();
  }
  fetch_now(layer, compute);
}

kernels::DecodeAttentionArgs Decode::attention_args(int layer, const predictor::DecodeBatch& batch,
                                                    int first_row) const {
  const int heads = model_.partition().heads.count;
  const int head_dim = model_.kv_shape().head_dim;
  const std::size_t q_row =
      kernels::bytes_of(device_.activation_type()) * static_cast<std::size_t>(heads * head_dim);
  const auto skip = static_cast<std::size_t>(first_row);
  const std::ptrdiff_t row = (std::ptrdiff_t{layer} * batch_.rows + first_row) * heads;
  return {.q = act_.q.as<std::byte>() + q_row * skip,
          .sequences = batch.sequences,
          .rows = batch.rows,
          .layer = layer,
          .num_heads = heads,
          .num_kv_heads = model_.kv_shape().num_kv_heads,
          .head_dim = head_dim,
          .scale = model_.attention_scale(),
          .out = act_.attn.as<std::byte>() + q_row * skip,
          .lse = lse_.as<float>() + row};
}

// Attention over all blocks of these rows.
void Decode::stream(const kernels::DecodeAttentionArgs& args, std::span<Sequence* const> rows,
                    kernels::Stream& compute) {
  for (Sequence* row : rows) nvme_reads_.bring_all(*row, args.layer);
  store_.streamed_attention(args, compute);
  if (any_outsized(rows)) compute.synchronize();  // as in fetch_now()
  for (Sequence* row : rows) nvme_reads_.let_go(*row, args.layer);
}

void Decode::attend(int layer, const predictor::DecodeBatch& batch, kernels::Stream& compute) {
  const kernels::DecodeAttentionArgs args = attention_args(layer, batch, 0);
  if (!kind_.streams_all) {
    device_.decode_attention(args, compute);
    return;
  }
  FT_CHECK(!policy_.observes());  // block maxima are by slot
  stream(args, rows_, compute);
}

// The first layer that calibrates in this step, or num_layers(); every M-th after it does too.
int Decode::first_calibrated(const Sequence& sequence) const {
  const int every = config_.calibrate_every;
  if (every == 0 || sequence.is_dense()) return model_.num_layers();
  const auto step = static_cast<int>(sequence.decode_steps % every);
  return std::min((every - step) % every, model_.num_layers());
}

bool Decode::calibrates(const Sequence& sequence, int layer) const {
  const int first = first_calibrated(sequence);
  return layer >= first && (layer - first) % config_.calibrate_every == 0;
}

bool Decode::audits(const Sequence& sequence) const {
  return config_.audit_every > 0 && sequence.decode_steps % config_.audit_every == 0;
}

predictor::AttentionRows Decode::exact_rows(int row) const {
  return {.block_max = exact_max_.as<float>(),
          .lse = exact_lse_.as<float>(),
          .rows = 1,
          .pitch = exact_pitch_,
          .num_columns = tables_->device.num_columns + row};
}

bool Decode::any_calibrates(int layer) const {
  return std::ranges::any_of(rows_, [&](const Sequence* row) { return calibrates(*row, layer); });
}

// Of the batch, from `layer` on.
predictor::AttentionRows Decode::attended_rows(int layer, int num_layers) const {
  const std::ptrdiff_t row = std::ptrdiff_t{layer} * batch_.rows * model_.partition().heads.count;
  return {.lse = lse_.as<float>() + row,
          .num_columns = tables_->device.num_columns,
          .num_layers = num_layers};
}

// A row of the batch, where a recorded step finds it.
predictor::DecodeBatch Decode::one_of_batch(int row) const {
  return {.rows = 1,
          .sequences = batch_.sequences + row,
          .histories = batch_.histories + row,
          .selections = batch_.selections + row};
}

// A row that calibrates at this layer gets its row over all blocks, the others what they attended.
void Decode::observe_calibrated(int layer, kernels::Stream& compute) {
  const int heads = model_.partition().heads.count;
  for (int row = 0; row < batch_.rows; ++row) {
    const Sequence& sequence = *rows_[static_cast<std::size_t>(row)];
    if (calibrates(sequence, layer)) {
      score_for_calibration(layer, row, compute);
      policy_.observe_decode(one_of_batch(row), layer, exact_rows(row), compute);
      continue;
    }
    predictor::AttentionRows own = attended_rows(layer, 1);
    own.lse += static_cast<std::ptrdiff_t>(row) * heads;
    own.num_columns += row;
    policy_.observe_decode(one_of_batch(row), layer, own, compute);
  }
}

// Layers without an exact row, as many in one launch as lie side by side.
void Decode::observe_attended(kernels::Stream& compute) {
  for (int first = 0; first < model_.num_layers();) {
    int end = first;
    while (end < model_.num_layers() && !any_calibrates(end)) ++end;
    if (end > first) {
      policy_.observe_decode(batch_, first, attended_rows(first, end - first), compute);
    }
    first = end + 1;
  }
}

kernels::DecodeAttentionArgs Decode::all_blocks_args(int layer, int row) const {
  kernels::DecodeAttentionArgs args = attention_args(layer, one_of_batch(row), row);
  args.out = nullptr;  // keys alone
  args.lse = exact_lse_.as<float>();
  args.block_max = exact_max_.as<float>();
  args.pitch = exact_pitch_;
  return args;
}

void Decode::score_for_calibration(int layer, int row, kernels::Stream& compute) {
  if (policy_.calibration() == predictor::Calibration::kExact) {
    return score_exactly(layer, row, compute);
  }
  device_.sketched_attention(all_blocks_args(layer, row), compute);
}

// Of the blocks without a slot, which a calibration by keys reads in the host's memory: values too,
// for the checksum.
void Decode::count_calibration_bytes(Sequence& sequence) const {
  if (policy_.calibration() != predictor::Calibration::kExact) return;
  const kernels::SequenceKv& kv = sequence.kv();
  const int absent = std::max(0, blocks_for(sequence.length()) - kv.num_slots);
  const auto block_bytes = static_cast<std::int64_t>(kv.shape.block_bytes());
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    if (!calibrates(sequence, layer)) continue;
    sequence.report.bytes_host += absent * kv.shape.num_kv_heads * block_bytes;
  }
}

// Blocks of the layer whose gather had not ended when the layer came to need it. Where the host
// runs ahead of the device it can't tell, and the layer's wait shows in the step's time instead.
void Decode::count_late(int layer, kernels::Stream& compute) {
  if (!device_.runs_at_once() || store_.fetched(layer)) return;
  const auto heads = static_cast<std::size_t>(model_.kv_shape().num_kv_heads);
  for (Sequence* row : rows_) {
    const std::int32_t* counts = row->fetches().counts + static_cast<std::size_t>(layer) * heads;
    counts_.resize(heads);
    device_.copy_out(counts_.data(), counts, heads * sizeof(std::int32_t), compute);
    compute.synchronize();
    row->report.late += std::accumulate(counts_.begin(), counts_.end(), std::int64_t{0});
  }
}

}  // namespace foretoken::worker
