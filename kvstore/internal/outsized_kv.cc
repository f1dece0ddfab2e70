#include "kvstore/outsized_kv.h"

#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "kernels/checksum.h"
#include "kvstore/internal/arena_guard.h"
#include "kvstore/internal/run_io.h"

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
  const std::size_t runs = runs_state_.size();
  runs_ = static_cast<std::byte**>(device.allocate_pinned(runs * sizeof(std::byte*)));
  std::fill_n(runs_, runs, nullptr);
  checksums_ = static_cast<std::uint64_t*>(
      device.allocate_pinned(runs * kSegmentBlocks * sizeof(std::uint64_t)));
  std::fill_n(checksums_, runs * kSegmentBlocks, 0);
  scores_ = static_cast<float*>(device.allocate_pinned(runs * sizeof(float)));
  std::fill_n(scores_, runs, 0.0F);
  for (std::size_t i = parts_.frames.size(); i > 0; --i) {
    free_frames_.push_back(static_cast<std::uint32_t>(i - 1));
  }
}

OutsizedKv::~OutsizedKv() {
  io_.forget(*listener_);
  device_.release_pinned(scores_);
  device_.release_pinned(checksums_);
  device_.release_pinned(runs_);
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

Status OutsizedKv::wait(int layer, Segments segments) {
  std::vector<HeadSegment> runs;
  for (int head = 0; head < parts_.shape.num_kv_heads; ++head) {
    for (int segment = segments.first; segment < segments.end; ++segment) {
      runs.push_back({head, segment});
    }
  }
  return wait(layer, runs);
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
    io_.read(*listener_, run, offset(run), seals_[static_cast<std::size_t>(run)]);
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
    io_.write(*listener_, run, offset(run));
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
  if (!bytes) return fail(bytes.error());
  Run& run = at(index);
  if (!copy_verified(parts_.frames[run.frame].host, bytes->data(), index)) {
    return io_.count_corrupt();
  }
  bytes_read_ += static_cast<std::int64_t>(bytes->size());
  run.place = Place::kArrived;
  arrived_.push_back(index);
}

// What could not be written is tried again, as long as the disk may be written to.
void OutsizedKv::on_written(RunIndex index, const Result<Seal>& written) {
  ++num_ended_;
  if (!status_) return;
  Run& run = at(index);
  run.place = written ? Place::kHere : Place::kDirty;
  if (written) {
    seals_[static_cast<std::size_t>(index)] = *written;
    return;
  }
  last_error_ = written.error();
  to_write_.push_back(index);
}

void OutsizedKv::fail(const Error& error) {
  if (status_) status_ = error;
}

}  // namespace foretoken::kvstore
