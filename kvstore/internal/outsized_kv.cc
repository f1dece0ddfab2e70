#include "kvstore/outsized_kv.h"

#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "kernels/checksum.h"
#include "kvstore/internal/arena_guard.h"
#include "kvstore/internal/run_io.h"
#include "kvstore/internal/slot_table.h"

namespace foretoken::kvstore {
namespace {

// Of the frames, how many are emptied at a time: looking for the least wanted ones takes a look at
// all.
constexpr std::size_t kEvictedShare = 16;
// Runs read for later steps, a step.
constexpr std::size_t kPromoted = 16;

std::size_t num_runs(const kernels::KvShape& shape, int num_segments) {
  return static_cast<std::size_t>(shape.num_layers) * static_cast<std::size_t>(shape.num_kv_heads) *
         static_cast<std::size_t>(num_segments);
}

}  // namespace

class OutsizedKv::Listener final : public RunIo::Owner {
 public:
  explicit Listener(OutsizedKv& kv) : kv_(kv) {}
  void on_read(RunIndex run, const Result<std::span<const std::byte>>& bytes) override {
    kv_.on_read(run, bytes);
  }
  void on_written(RunIndex run, const Result<Seal>& written) override {
    kv_.on_written(run, written);
  }

 private:
  OutsizedKv& kv_;
};

OutsizedKv::OutsizedKv(kernels::Device& device, RunIo& io, ArenaGuard* guard, Parts parts)
    : device_(device),
      io_(io),
      guard_(guard),
      parts_(std::move(parts)),
      runs_state_(num_runs(parts_.shape, parts_.num_segments)),
      seals_(runs_state_.size()),
      held_(static_cast<std::size_t>(parts_.shape.num_layers)),
      listener_(std::make_unique<Listener>(*this)) {
  FT_CHECK(parts_.frames.size() >= least_frames(parts_.shape, parts_.num_segments),
           parts_.frames.size(), parts_.num_segments);
  num_unwritten_.assign(static_cast<std::size_t>(parts_.num_segments),
                        parts_.shape.num_layers * parts_.shape.num_kv_heads);
  for (std::size_t i = parts_.frames.size(); i > 0; --i) {
    free_frames_.push_back(static_cast<std::uint32_t>(i - 1));
  }
  const std::size_t runs = runs_state_.size();
  const std::size_t room = (runs + 31) / 32 * 32;  // so that each table begins a line
  constexpr std::size_t kChecksums = kSegmentBlocks * sizeof(std::uint64_t);
  tables_ = device.allocate_pinned(room * (sizeof(std::byte*) + kChecksums + sizeof(float)));
  runs_ = static_cast<std::byte**>(tables_);
  checksums_ = reinterpret_cast<std::uint64_t*>(runs_ + room);
  scores_ = reinterpret_cast<float*>(checksums_ + room * kSegmentBlocks);
  std::fill_n(runs_, runs, nullptr);
  std::fill_n(checksums_, runs * kSegmentBlocks, 0);
  std::fill_n(scores_, runs, 0.0F);
}

OutsizedKv::~OutsizedKv() {
  io_.forget(*listener_);
  device_.release_pinned(tables_);
}

std::size_t OutsizedKv::least_frames(const kernels::KvShape& shape, int num_segments) {
  return static_cast<std::size_t>(shape.num_kv_heads) *
         static_cast<std::size_t>(2 * num_segments + shape.num_layers);
}

// ---- places -----------------------------------------------------------------------------------

RunIndex OutsizedKv::index(int layer, HeadSegment run) const {
  const int heads = parts_.shape.num_kv_heads;
  FT_CHECK(layer >= 0 && layer < parts_.shape.num_layers && run.head >= 0 && run.head < heads &&
               run.segment >= 0 && run.segment < parts_.num_segments,
           layer, run.head, run.segment);
  return RunIndex{
      static_cast<std::uint32_t>((layer * heads + run.head) * parts_.num_segments + run.segment)};
}

std::vector<HeadSegment> OutsizedKv::on_all_heads(Segments segments) const {
  std::vector<HeadSegment> runs;
  for (int head = 0; head < parts_.shape.num_kv_heads; ++head) {
    for (int segment = segments.first; segment < segments.end; ++segment) {
      runs.push_back({head, segment});
    }
  }
  return runs;
}

int OutsizedKv::layer_of(RunIndex run) const {
  return static_cast<int>(static_cast<std::uint32_t>(run)) / parts_.num_segments /
         parts_.shape.num_kv_heads;
}

// A slot is a slab: its layers' runs lie one behind the other.
std::uint64_t OutsizedKv::offset(RunIndex run) const {
  const auto layer = static_cast<std::size_t>(layer_of(run));
  const std::size_t slots = parts_.slots.size();
  return parts_.slots[static_cast<std::size_t>(run) - layer * slots] +
         layer * parts_.shape.run_bytes();
}

std::byte* const* OutsizedKv::runs_of(int layer) const {
  return runs_ +
         static_cast<std::ptrdiff_t>(layer) * static_cast<std::ptrdiff_t>(parts_.slots.size());
}

bool OutsizedKv::in_frame(const Run& run) const {
  return run.place == Place::kOpen || run.place == Place::kDirty || run.place == Place::kWriting ||
         run.place == Place::kHere;
}

bool OutsizedKv::is_here(int layer, HeadSegment run) const {
  return in_frame(runs_state_[static_cast<std::size_t>(index(layer, run))]);
}

void OutsizedKv::show(RunIndex run) {
  runs_[static_cast<std::size_t>(run)] = parts_.frames[at(run).frame].device;
}
void OutsizedKv::hide(RunIndex run) { runs_[static_cast<std::size_t>(run)] = nullptr; }

std::optional<std::uint32_t> OutsizedKv::take_frame() {
  if (free_frames_.empty()) {
    for (const RunIndex run : least_wanted(parts_.frames.size() / kEvictedShare + 1)) evict(run);
  }
  if (free_frames_.empty()) return std::nullopt;
  const std::uint32_t frame = free_frames_.back();
  free_frames_.pop_back();
  return frame;
}

// Of the runs that may leave, those of the lowest scores, and of these those wanted longest ago.
std::vector<RunIndex> OutsizedKv::least_wanted(std::size_t count) const {
  using Rank = std::tuple<float, std::uint64_t, RunIndex>;
  std::vector<Rank> runs;
  for (std::size_t i = 0; i < runs_state_.size(); ++i) {
    const Run& run = runs_state_[i];
    if (run.place != Place::kHere || run.is_held) continue;
    runs.emplace_back(scores_[i], run.wanted, RunIndex{static_cast<std::uint32_t>(i)});
  }
  count = std::min(count, runs.size());
  std::ranges::nth_element(runs, runs.begin() + static_cast<std::ptrdiff_t>(count));
  std::ranges::sort(runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(count));
  std::vector<RunIndex> least;
  for (std::size_t i = 0; i < count; ++i) least.push_back(std::get<RunIndex>(runs[i]));
  return least;
}

void OutsizedKv::evict(RunIndex run) {
  hide(run);
  at(run).place = Place::kStored;
  free_frames_.push_back(at(run).frame);
}

void OutsizedKv::ask_for(RunIndex run) {
  at(run).place = Place::kAsked;
  to_read_.push_back(run);
}

// ---- prefixes ---------------------------------------------------------------------------------

bool OutsizedKv::is_reused(RunIndex run) const {
  return static_cast<int>(run) % parts_.num_segments < num_reused_;
}

RunIndex OutsizedKv::table_index(int head, int segment) const {
  return RunIndex{static_cast<std::uint32_t>(
      runs_state_.size() + static_cast<std::size_t>(head * parts_.num_segments + segment))};
}

void OutsizedKv::reuse(HeadSegment run, const SlotTable& table) {
  num_reused_ = std::max(num_reused_, run.segment + 1);
  for (int layer = 0; layer < parts_.shape.num_layers; ++layer) {
    const RunIndex at = index(layer, run);
    FT_CHECK(this->at(at).place == Place::kEmpty, layer, run.head, run.segment);
    this->at(at).place = Place::kStored;
    const auto place = static_cast<std::size_t>(at);
    std::ranges::copy(table.checksums_of(layer), checksums_ + place * kSegmentBlocks);
    if (parts_.is_sealed) seals_[place] = table.seals[static_cast<std::size_t>(layer)];
  }
}

void OutsizedKv::use(int hit_segments, std::vector<std::uint64_t> slots) {
  FT_CHECK(slots.size() == parts_.slots.size(), slots.size(), parts_.slots.size());
  num_reused_ = std::min(num_reused_, hit_segments);
  parts_.slots = std::move(slots);
  for (std::size_t i = 0; i < runs_state_.size(); ++i) {
    const RunIndex run{static_cast<std::uint32_t>(i)};
    if (at(run).place == Place::kEmpty || is_reused(run)) continue;
    FT_CHECK(at(run).place == Place::kStored, i);  // nothing has been asked for yet
    at(run).place = Place::kEmpty;
  }
}

void OutsizedKv::publish(int segment, const PrefixKey& key) {
  if (segment < num_reused_) return;
  const auto heads = static_cast<std::size_t>(parts_.shape.num_kv_heads);
  to_publish_.push_back({segment, key, std::vector<std::uint64_t>(heads),
                         std::vector<Seal>(parts_.is_sealed ? heads : 0)});
  advance(0);
}

std::vector<OutsizedKv::Published> OutsizedKv::take_published() {
  return std::exchange(published_, {});
}

std::vector<HeadSegment> OutsizedKv::take_refuted() { return std::exchange(refuted_, {}); }

void OutsizedKv::finish_publishing(std::chrono::milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (status_ && !to_publish_.empty() && std::chrono::steady_clock::now() < end) {
    advance();
    if (!io_.is_busy()) return;  // what is left can't be written now
    io_.wait(end);
  }
}

// A slot's table is written when all of its runs are, behind all else.
void OutsizedKv::start_tables() {
  const int heads = parts_.shape.num_kv_heads;
  while (!to_publish_.empty() && tables_begun_ < heads && to_read_.empty() && io_.can_write()) {
    const int segment = to_publish_.front().segment;
    if (num_unwritten_[static_cast<std::size_t>(segment)] > 0) return;
    write_table(tables_begun_++);
  }
}

void OutsizedKv::write_table(int head) {
  Published& published = to_publish_.front();
  SlotTable table(parts_.shape, parts_.is_sealed);
  for (int layer = 0; layer < parts_.shape.num_layers; ++layer) {
    const auto run = static_cast<std::size_t>(index(layer, {head, published.segment}));
    std::ranges::copy(std::span(checksums_ + run * kSegmentBlocks, kSegmentBlocks),
                      table.checksums_of(layer).begin());
    if (parts_.is_sealed) table.seals[static_cast<std::size_t>(layer)] = seals_[run];
  }
  published.digests[static_cast<std::size_t>(head)] = table.digest();
  const std::size_t bytes = SlotTable::bytes(parts_.shape, parts_.is_sealed);
  table.encode(io_.next_buffer().first(bytes));
  io_.write(
      *listener_, table_index(head, published.segment),
      {offset(index(0, {head, published.segment})) + parts_.shape.slab_payload_bytes(), bytes});
}

// What could not be written is not published.
void OutsizedKv::on_table_written(RunIndex index, const Result<Seal>& written) {
  const auto slot = static_cast<std::size_t>(index) - runs_state_.size();
  if (!written) {
    table_failed_ = true;
  } else if (parts_.is_sealed) {
    to_publish_.front().seals[slot / static_cast<std::size_t>(parts_.num_segments)] = *written;
  }
  if (++tables_written_ < parts_.shape.num_kv_heads) return;
  if (!table_failed_) published_.push_back(std::move(to_publish_.front()));
  to_publish_.pop_front();
  tables_begun_ = tables_written_ = 0;
  table_failed_ = false;
}

// ---- filling ----------------------------------------------------------------------------------

Status OutsizedKv::make_room(int layer, Segments segments) {
  show_arrived();
  for (int head = 0; head < parts_.shape.num_kv_heads; ++head) {
    for (int segment = segments.first; segment < segments.end; ++segment) {
      FT_RETURN_IF_ERROR(status_);
      const RunIndex run = index(layer, {head, segment});
      FT_CHECK(at(run).place == Place::kEmpty, layer, head, segment);
      auto frame = take_frame();
      for (; !frame; frame = take_frame()) {
        FT_RETURN_IF_ERROR(wait_for_end());
        show_arrived();  // its frame may be the one
      }
      at(run) = {.place = Place::kOpen, .is_held = false, .frame = *frame, .wanted = ++clock_};
      show(run);
    }
  }
  return status_;
}

void OutsizedKv::fill(int layer, Segments segments) {
  if (!status_) return;
  for (int head = 0; head < parts_.shape.num_kv_heads; ++head) {
    for (int segment = segments.first; segment < segments.end; ++segment) {
      const RunIndex run = index(layer, {head, segment});
      FT_CHECK(at(run).place == Place::kOpen, layer, head, segment);
      at(run).place = Place::kDirty;
      to_write_.push_back(run);
    }
  }
  advance();
}

// ---- reading ----------------------------------------------------------------------------------

bool OutsizedKv::ask(int layer, std::span<const HeadSegment> runs) {
  if (!status_) return false;
  const auto heads = static_cast<std::size_t>(parts_.shape.num_kv_heads);
  const auto kept = heads * static_cast<std::size_t>(parts_.num_segments + parts_.shape.num_layers);
  ++clock_;
  for (const HeadSegment& run : runs) {
    if (num_held_ + kept >= parts_.frames.size()) return false;
    hold(layer, index(layer, run));
  }
  return true;
}

void OutsizedKv::hold(int layer, RunIndex index) {
  Run& run = at(index);
  FT_CHECK(run.place != Place::kEmpty, layer, static_cast<std::uint32_t>(index));
  run.wanted = clock_;
  if (!run.is_held) {
    held_[static_cast<std::size_t>(layer)].push_back(index);
    ++num_held_;
  }
  run.is_held = true;
  if (run.place == Place::kStored) ask_for(index);
}

void OutsizedKv::drop_unheld() {
  std::erase_if(to_read_, [this](RunIndex run) {
    if (at(run).is_held) return false;
    at(run).place = Place::kStored;
    return true;
  });
}

Status OutsizedKv::wait(int layer, std::span<const HeadSegment> runs) {
  ++clock_;
  for (;;) {
    FT_RETURN_IF_ERROR(status_);
    show_arrived();
    for (const HeadSegment& run : runs) hold(layer, index(layer, run));
    if (std::ranges::all_of(runs, [&](HeadSegment run) { return is_here(layer, run); })) {
      return Ok{};
    }
    FT_RETURN_IF_ERROR(wait_for_end());
  }
}

bool OutsizedKv::ask(int layer, Segments segments) { return ask(layer, on_all_heads(segments)); }

Status OutsizedKv::wait(int layer, Segments segments) {
  return wait(layer, on_all_heads(segments));
}

void OutsizedKv::let_go(int layer) {
  auto& held = held_[static_cast<std::size_t>(layer)];
  for (const RunIndex run : held) at(run).is_held = false;
  num_held_ -= held.size();
  held.clear();
}

void OutsizedKv::promote() {
  if (!status_ || !to_read_.empty()) return;  // the step's own reads keep the disk busy
  std::vector<std::pair<float, RunIndex>> wanted;
  for (std::size_t i = 0; i < runs_state_.size(); ++i) {
    if (runs_state_[i].place != Place::kStored) continue;
    wanted.emplace_back(scores_[i], RunIndex{static_cast<std::uint32_t>(i)});
  }
  const auto most = std::min(wanted.size(), kPromoted);
  std::ranges::partial_sort(wanted, wanted.begin() + static_cast<std::ptrdiff_t>(most),
                            std::greater<>());
  const std::vector<RunIndex> least = least_wanted(most);
  for (std::size_t i = 0; i < least.size(); ++i) {
    const auto& [score, run] = wanted[i];
    if (score <= scores_[static_cast<std::size_t>(least[i])]) break;
    evict(least[i]);
    ask_for(run);
  }
  advance();
}

// ---- transfers --------------------------------------------------------------------------------

void OutsizedKv::advance(std::size_t most) {
  io_.advance(most);
  if (!status_) return;
  start_writes();
  start_reads();
  start_tables();
}

void OutsizedKv::show_arrived() {
  for (const RunIndex run : arrived_) {
    at(run).place = Place::kHere;
    show(run);
  }
  arrived_.clear();
}

// Something ends, or nothing ever will. Where another sequence has all buffers, it is something of
// that one.
Status OutsizedKv::wait_for_end() {
  const std::int64_t ended = num_ended_;
  advance();
  if (!status_ || num_ended_ != ended) return status_;
  if (!io_.is_busy()) {
    fail(last_error_.value_or(
        Error{ErrorCode::kUnavailable, "KV on NVMe: the disk has failed; see the log"}));
    return status_;
  }
  io_.wait();
  return status_;
}

// Where there is no frame, the run waits for one.
void OutsizedKv::start_reads() {
  while (!to_read_.empty() && io_.can_read()) {
    const auto frame = take_frame();
    if (!frame) return;
    const RunIndex run = to_read_.front();
    to_read_.pop_front();
    at(run).frame = *frame;
    at(run).place = Place::kComing;
    io_.read(*listener_, run, {offset(run), parts_.shape.run_bytes()},
             seals_[static_cast<std::size_t>(run)]);
  }
}

// Beside reads, which go first, one at a time: some step's reads may always wait.
void OutsizedKv::start_writes() {
  for (bool more = true; more && status_ && !to_write_.empty() && io_.can_write();) {
    more = to_read_.empty();
    const RunIndex run = to_write_.front();
    to_write_.pop_front();
    if (!copy_verified(io_.next_buffer().data(), parts_.frames[at(run).frame].host, run)) return;
    at(run).place = Place::kWriting;
    io_.write(*listener_, run, {offset(run), parts_.shape.run_bytes()});
  }
}

// A run's blocks, each with its proof in one pass. False: the sequence has failed.
bool OutsizedKv::copy_verified(std::byte* to, const std::byte* from, RunIndex run) {
  std::optional<ArenaGuard::Scope> open;
  if (guard_ != nullptr) open.emplace(*guard_);
  const std::uint64_t* due = checksums_ + static_cast<std::size_t>(run) * kSegmentBlocks;
  for (int block = 0; block < kSegmentBlocks; ++block) {
    const std::size_t at = kernels::slab_block_offset(parts_.shape, 0, block);
    if (kernels::copy_with_checksum(to + at, from + at, parts_.shape.block_bytes(), layer_of(run),
                                    block) != due[block]) {
      fail({ErrorCode::kCorrupt, "a block of KV failed its check between memory and NVMe"});
      return false;
    }
  }
  return true;
}

void OutsizedKv::on_read(RunIndex index, const Result<std::span<const std::byte>>& bytes) {
  ++num_ended_;
  if (!status_) return;
  if (!bytes) return on_slot_failed(index, bytes.error());
  Run& run = at(index);
  if (!copy_verified(parts_.frames[run.frame].host, bytes->data(), index)) {
    io_.count_corrupt();
    return on_slot_failed(index, status_.error());
  }
  bytes_read_ += static_cast<std::int64_t>(bytes->size());
  run.place = Place::kArrived;
  arrived_.push_back(index);
}

// What could not be written is tried again, as long as the disk may be written to.
void OutsizedKv::on_written(RunIndex index, const Result<Seal>& written) {
  ++num_ended_;
  if (!status_) return;
  if (is_table(index)) return on_table_written(index, written);
  Run& run = at(index);
  run.place = written ? Place::kHere : Place::kDirty;
  if (written) {
    seals_[static_cast<std::size_t>(index)] = *written;
    --num_unwritten_[static_cast<std::size_t>(index) %
                     static_cast<std::size_t>(parts_.num_segments)];
    return;
  }
  last_error_ = written.error();
  to_write_.push_back(index);
}

// A prefix that can't be read is one that is not there: the next life does without.
void OutsizedKv::on_slot_failed(RunIndex run, const Error& error) {
  const auto slots = static_cast<std::size_t>(run) % parts_.slots.size();
  const auto segments = static_cast<std::size_t>(parts_.num_segments);
  if (refutes_slot(error)) {
    refuted_.push_back({static_cast<int>(slots / segments), static_cast<int>(slots % segments)});
  }
  if (!is_reused(run) || error.code != ErrorCode::kIo) return fail(error);
  fail({ErrorCode::kCorrupt, error.message});
}

void OutsizedKv::fail(const Error& error) {
  if (status_) status_ = error;
}

}  // namespace foretoken::kvstore
