#include "worker/sequence.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "common/check.h"
#include "kernels/kept_blocks.h"
#include "kernels/key_sketch.h"
#include "kernels/one_head.h"

namespace foretoken::worker {
namespace {

// Lays arrays one behind the other in a buffer, each on a cache line.
class Layout {
 public:
  template <typename T>
  std::size_t add(std::size_t count) {
    const std::size_t at = bytes_;
    bytes_ += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

struct TableLayout {
  TableLayout(const kernels::KvShape& shape, int max_blocks, int num_slots) {
    const auto maps = static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads);
    const auto segments = static_cast<std::size_t>((max_blocks + kSegmentBlocks - 1) /
                                                   kSegmentBlocks * shape.num_kv_heads);
    block_to_slot = layout.add<std::int32_t>(maps * static_cast<std::size_t>(max_blocks));
    slot_to_block = layout.add<std::int32_t>(maps * static_cast<std::size_t>(num_slots));
    entries = layout.add<kernels::FetchEntry>(maps * static_cast<std::size_t>(num_slots));
    counts = layout.add<std::int32_t>(maps);
    totals = layout.add<std::uint64_t>(2);
    mismatches = layout.add<std::uint32_t>(1);
    slabs = layout.add<std::byte*>(segments);
    length = layout.add<std::int32_t>(1);
    prompt_columns = layout.add<std::int32_t>(1);
    tokens = layout.add<TokenId>(static_cast<std::size_t>(max_blocks) * kBlockTokens);
    sequence = layout.add<kernels::SequenceKv>(1);
    fetches = layout.add<kernels::FetchList>(1);
    history = layout.add<kernels::HistoryState>(1);
    selection = layout.add<kernels::Selection>(1);
    heads = layout.add<kernels::SequenceKv>(static_cast<std::size_t>(shape.num_kv_heads));
  }
  Layout layout;
  std::size_t block_to_slot, slot_to_block, entries, counts, totals, mismatches, slabs, length,
      prompt_columns, tokens;
  std::size_t sequence, fetches, history, selection;  // the batch of one
  std::size_t heads;                                  // ... and of one KV head each
};

// Of all layers and KV heads, num_blocks each.
std::size_t block_bytes(const kernels::KvShape& shape, int num_blocks) {
  return static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads) *
         static_cast<std::size_t>(num_blocks) * shape.block_bytes();
}

std::size_t slot_bytes(const kernels::KvShape& shape, const predictor::Policy& policy,
                       int num_slots) {
  return block_bytes(shape, num_slots) + policy.block_max_bytes(num_slots);
}

// Slots a KV head: sink, local window and the policy's choice, or every block there can be where
// the policy attends all of them and may keep them.
int slots_for(const predictor::Policy& policy, int max_blocks) {
  const std::optional<int> selected = policy.selected_per_head();
  const bool is_whole = !selected && policy.config().residency != predictor::Residency::kNever;
  if (is_whole) return max_blocks;
  return std::min(max_blocks, kernels::kSinkBlocks + kLocalBlocks + selected.value_or(0));
}

bool keeps_sketches(const predictor::Policy& policy) {
  return policy.calibration() == predictor::Calibration::kSketch;
}

std::size_t all_sketch_bytes(const kernels::KvShape& shape, int max_blocks) {
  return static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads) *
         static_cast<std::size_t>(max_blocks) * kernels::sketch_bytes(shape);
}

}  // namespace

SequenceBytes sequence_bytes(const kernels::KvShape& shape, const predictor::Policy& policy,
                             int max_tokens) {
  const int max_blocks = blocks_for(max_tokens);
  const int num_slots = slots_for(policy, max_blocks);
  return {.kv_slots = slot_bytes(shape, policy, num_slots),
          .tables = TableLayout(shape, max_blocks, num_slots).layout.bytes(),
          .history = policy.state_bytes(max_tokens),
          .sketches = keeps_sketches(policy) ? all_sketch_bytes(shape, max_blocks) : 0,
          .all_blocks = slot_bytes(shape, policy, max_blocks)};
}

Sequence::Sequence(const AdmitSequence& admit, kvstore::Reservation reservation,
                   const kernels::KvShape& shape, predictor::Policy& policy,
                   kernels::Device& device, kernels::Stream& stream)
    : sampling(admit.sampling),
      forced_ids(admit.forced_ids),
      id_(admit.sequence),
      prompt_length_(static_cast<int>(admit.prompt.size())),
      num_generated_(static_cast<int>(admit.num_generated)),
      length_(prompt_length_),
      device_(device),
      reservation_(std::move(reservation)) {
  const int max_tokens = static_cast<int>(admit.max_length);
  FT_CHECK(max_tokens >= prompt_length_ && prompt_length_ > 0, max_tokens, prompt_length_);
  kv_.shape = shape;
  recalls.assign(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads), 1.0F);
  kv_.max_blocks = blocks_for(max_tokens);
  kv_.max_segments = reservation_.num_segments;
  is_dense_ = admit.dense && policy.spills();
  const int num_slots = is_dense_ ? kv_.max_blocks : slots_for(policy, kv_.max_blocks);
  if (const kvstore::OutsizedKv* outsized = reservation_.outsized.get()) {
    kv_.runs = outsized->runs();
    kv_.checksums = outsized->checksums();
  }
  streams_all_ = !policy.selected_per_head() && num_slots < kv_.max_blocks;
  policy_state_ = policy.admit(max_tokens, stream);
  if (const kvstore::OutsizedKv* outsized = reservation_.outsized.get()) {
    policy_state_->selection.segment_scores = outsized->scores();
    policy_state_->selection.max_segments = kv_.max_segments;
  }
  if (worker::keeps_sketches(policy)) {
    sketches_ = {device, all_sketch_bytes(shape, kv_.max_blocks), kernels::MemoryUse::kSketches};
    device.fill_zero(sketches_.data(), sketches_.bytes(), stream);
    kv_.sketches = sketches_.as<std::byte>();
  }
  try {
    allocate_slots(policy, num_slots);
    allocate_tables(admit.prompt, stream);
  } catch (const Exception& failure) {
    // Steps with an outsized sequence are not recorded.
    const bool may_stream = !policy.selected_per_head() &&
                            (policy.config().residency == predictor::Residency::kWhereItFits ||
                             reservation_.outsized != nullptr);
    if (!may_stream || failure.error().code != ErrorCode::kExhausted) throw;
    streams_all_ = true;  // dense attention over a context that doesn't fit the device
    allocate_slots(policy, std::min(kv_.max_blocks, kernels::kSinkBlocks + kLocalBlocks));
    allocate_tables(admit.prompt, stream);
  }
  report.full_kv_bytes = static_cast<std::int64_t>(block_bytes(shape, kv_.max_blocks));
  report.device_bytes = device_bytes();
}

void Sequence::allocate_slots(const predictor::Policy& policy, int num_slots) {
  slots_ = kernels::DeviceBuffer();  // first: the device may be full
  slots_ = {device_, slot_bytes(kv_.shape, policy, num_slots), kernels::MemoryUse::kKvSlots};
  kv_.num_slots = num_slots;
  kv_.slots = slots_.as<std::byte>();
  if (policy.observes()) {
    kv_.block_max = reinterpret_cast<float*>(kv_.slots + block_bytes(kv_.shape, num_slots));
  }
}

void Sequence::allocate_tables(const std::vector<TokenId>& prompt, kernels::Stream& stream) {
  const TableLayout at(kv_.shape, kv_.max_blocks, kv_.num_slots);
  tables_ = {device_, at.layout.bytes(), kernels::MemoryUse::kTables};
  auto* base = tables_.as<std::byte>();
  device_.fill_zero(base, tables_.bytes(), stream);
  kv_.block_to_slot = reinterpret_cast<std::int32_t*>(base + at.block_to_slot);
  kv_.slot_to_block = reinterpret_cast<std::int32_t*>(base + at.slot_to_block);
  kv_.slabs = reinterpret_cast<std::byte* const*>(base + at.slabs);
  kv_.length = reinterpret_cast<std::int32_t*>(base + at.length);
  device_.copy_in(kv_.length, &prompt_length_, sizeof prompt_length_, stream);
  const std::int32_t columns = blocks_for(prompt_length_);
  device_.copy_in(base + at.prompt_columns, &columns, sizeof columns, stream);
  prompt_columns_ = reinterpret_cast<std::int32_t*>(base + at.prompt_columns);
  kv_.tokens = reinterpret_cast<TokenId*>(base + at.tokens);
  kv_.mismatches = reinterpret_cast<std::uint32_t*>(base + at.mismatches);
  device_.copy_in(kv_.tokens, prompt.data(), prompt.size() * sizeof(TokenId), stream);
  fetches_ = {reinterpret_cast<kernels::FetchEntry*>(base + at.entries),
              reinterpret_cast<std::int32_t*>(base + at.counts), kv_.num_slots,
              reinterpret_cast<std::uint64_t*>(base + at.totals)};
  device_.copy_in(base + at.history, &policy_state_->history, sizeof policy_state_->history,
                  stream);
  device_.copy_in(base + at.selection, &policy_state_->selection, sizeof policy_state_->selection,
                  stream);
  alone_ = {.rows = 1,
            .sequences = reinterpret_cast<kernels::SequenceKv*>(base + at.sequence),
            .histories = reinterpret_cast<kernels::HistoryState*>(base + at.history),
            .selections = reinterpret_cast<kernels::Selection*>(base + at.selection),
            .scores_segments = outsized() != nullptr};
  fetches_alone_ = reinterpret_cast<kernels::FetchList*>(base + at.fetches);
  heads_alone_ = reinterpret_cast<kernels::SequenceKv*>(base + at.heads);
  prompt_is_resident_ = has_slots_for_prompt();
  upload_slot_tables(0, prompt_is_resident_ ? columns : 0, stream);
}

bool Sequence::has_slots_for_prompt() const { return blocks_for(prompt_length_) <= kv_.num_slots; }

// Says what slots there are: of every layer and head, slot i holds block first_block + i, and those
// behind num_blocks hold none. Waits for the stream: what is copied ends here.
void Sequence::upload_slot_tables(int first_block, int num_blocks, kernels::Stream& stream) {
  const auto table = [&](int columns, int begin, int first_value) {
    std::vector<std::int32_t> row(static_cast<std::size_t>(columns), kernels::kAbsent);
    std::iota(row.begin() + begin, row.begin() + begin + num_blocks, first_value);
    std::vector<std::int32_t> rows;
    const int maps = kv_.shape.num_layers * kv_.shape.num_kv_heads;
    rows.reserve(row.size() * static_cast<std::size_t>(maps));
    for (int map = 0; map < maps; ++map) rows.insert(rows.end(), row.begin(), row.end());
    return rows;
  };
  const auto block_to_slot = table(kv_.max_blocks, first_block, 0);
  const auto slot_to_block = table(kv_.num_slots, 0, first_block);
  device_.copy_in(kv_.block_to_slot, block_to_slot.data(),
                  block_to_slot.size() * sizeof(std::int32_t), stream);
  device_.copy_in(kv_.slot_to_block, slot_to_block.data(),
                  slot_to_block.size() * sizeof(std::int32_t), stream);
  fetches_.max_entries = kv_.num_slots;
  device_.copy_in(const_cast<kernels::SequenceKv*>(alone_.sequences), &kv_, sizeof kv_, stream);
  device_.copy_in(fetches_alone_, &fetches_, sizeof fetches_, stream);
  std::vector<kernels::SequenceKv> heads;
  heads.reserve(static_cast<std::size_t>(kv_.shape.num_kv_heads));
  for (int head = 0; head < kv_.shape.num_kv_heads; ++head) {
    heads.push_back(kernels::one_head(kv_, head));
  }
  device_.copy_in(heads_alone_, heads.data(), heads.size() * sizeof(kernels::SequenceKv), stream);
  stream.synchronize();
}

void Sequence::upload_slabs(kernels::Stream& stream) {
  device_.copy_in(const_cast<std::byte**>(kv_.slabs), reservation_.slabs.data(),
                  reservation_.slabs.size() * sizeof(std::byte*), stream);
  stream.synchronize();
}

void Sequence::make_prompt_resident(kernels::Stream& stream) {
  if (prompt_is_resident_ || !has_slots_for_prompt()) return;
  prompt_is_resident_ = true;
  upload_slot_tables(0, blocks_for(prompt_length_), stream);
}

void Sequence::spill(const predictor::Policy& policy, const kernels::DeviceBuffer& scratch,
                     kernels::Stream& stream) {
  FT_CHECK(is_dense_, raw(id_));
  is_dense_ = false;
  const int num_slots = slots_for(policy, kv_.max_blocks);
  if (num_slots == kv_.num_slots) return;  // the budget holds all of it

  // The last token's KV is not stored yet; block b lies in slot b, as nothing was ever evicted.
  const int stored = decodes() ? length_ - 1 : 0;
  const int first_kept = kernels::first_local_block(stored);
  const int num_kept = blocks_for(stored) - first_kept;
  const int maps = kv_.shape.num_layers * kv_.shape.num_kv_heads;
  const std::size_t block = kv_.shape.block_bytes();
  const std::size_t bytes = static_cast<std::size_t>(num_kept) * block;
  const auto at = [block](const kernels::DeviceBuffer& buffer, int index) {
    return buffer.as<std::byte>() + static_cast<std::size_t>(index) * block;
  };
  for (int map = 0; map < maps; ++map) {
    device_.copy(at(scratch, map * num_kept), at(slots_, map * kv_.num_slots + first_kept), bytes,
                 stream);
  }
  stream.synchronize();
  allocate_slots(policy, num_slots);
  for (int map = 0; map < maps; ++map) {
    device_.copy(at(slots_, map * num_slots), at(scratch, map * num_kept), bytes, stream);
  }
  prompt_is_resident_ = false;
  upload_slot_tables(first_kept, num_kept, stream);
  report.device_bytes = device_bytes();
}

void Sequence::copy_fetches(kernels::Stream& stream) {
  const auto maps = static_cast<std::size_t>(kv_.shape.num_layers * kv_.shape.num_kv_heads);
  const std::size_t entries = maps * static_cast<std::size_t>(fetches_.max_entries);
  if (!host_entries_ || host_entries_->size() != entries) {
    host_entries_ = std::make_unique<PinnedArray<kernels::FetchEntry>>(device_, entries);
    host_counts_ = std::make_unique<PinnedArray<std::int32_t>>(device_, maps);
  }
  device_.copy_out(host_entries_->data(), fetches_.entries, entries * sizeof(kernels::FetchEntry),
                   stream);
  device_.copy_out(host_counts_->data(), fetches_.counts, maps * sizeof(std::int32_t), stream);
}

std::span<const kernels::FetchEntry> Sequence::host_fetches(int layer, int kv_head) const {
  if (!host_entries_) return {};
  const auto map = static_cast<std::size_t>(layer * kv_.shape.num_kv_heads + kv_head);
  return {host_entries_->data() + map * static_cast<std::size_t>(fetches_.max_entries),
          static_cast<std::size_t>(host_counts_->data()[map])};
}

KvReport Sequence::final_report(kernels::Stream& stream) {
  std::array<std::uint64_t, 2> totals{};
  std::uint32_t fallbacks = 0;
  std::uint32_t mismatches = 0;
  device_.copy_out(totals.data(), fetches_.totals, sizeof totals, stream);
  device_.copy_out(&mismatches, kv_.mismatches, sizeof mismatches, stream);
  if (const std::uint32_t* counter = policy_state_->history.fallbacks) {
    device_.copy_out(&fallbacks, counter, sizeof fallbacks, stream);
  }
  stream.synchronize();
  report.predictor_fallbacks = fallbacks;
  // Where a disk has lost it, ops miss blocks since, and the memory is good.
  const bool disk_lost_it = outsized() != nullptr && !outsized()->status() &&
                            outsized()->status().error().code != ErrorCode::kCorrupt;
  report.checksum_failures = disk_lost_it ? 0 : mismatches;
  report.blocks_predicted = static_cast<std::int64_t>(totals[0]);
  report.blocks_fetched = static_cast<std::int64_t>(totals[1]);
  // Beside what calibrations have read.
  report.bytes_host += report.blocks_fetched * static_cast<std::int64_t>(kv_.shape.block_bytes());
  if (outsized() != nullptr) report.bytes_nvme = outsized()->bytes_read();
  return report;
}

TokenId Sequence::next_forced() const {
  const auto index = static_cast<std::size_t>(length() - prompt_length_);
  return index < forced_ids.size() ? forced_ids[index] : -1;
}

std::int64_t Sequence::device_bytes() const {
  return static_cast<std::int64_t>(slots_.bytes() + tables_.bytes() +
                                   policy_state_->memory.bytes() + sketches_.bytes());
}

}  // namespace foretoken::worker
