#include "kvstore/internal/run_io.h"

#include <poll.h>

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace foretoken::kvstore {
namespace {

constexpr int kMaxTries = 3;

TimePoint now() { return std::chrono::steady_clock::now(); }

}  // namespace

RunIo::RunIo(IoMemory memory, std::unique_ptr<BlockDevice> device, std::size_t buffer_bytes)
    : memory_(std::move(memory)),
      transfers_(kDepth),
      device_(std::move(device)),
      buffer_bytes_(buffer_bytes) {
  FT_CHECK(memory_.bytes().size() >= buffer_bytes * kDepth, memory_.bytes().size(), buffer_bytes);
}

// ---- starting ---------------------------------------------------------------------------------

std::span<std::byte> RunIo::buffer(std::size_t index) const {
  return memory_.bytes().subspan(index * buffer_bytes_, buffer_bytes_);
}

std::optional<std::size_t> RunIo::free_buffer() const {
  const auto found =
      std::ranges::find_if(transfers_, [](const auto& transfer) { return !transfer.has_value(); });
  if (found == transfers_.end()) return std::nullopt;
  return static_cast<std::size_t>(found - transfers_.begin());
}

bool RunIo::can_read() const { return health_.may_read(now()) && free_buffer().has_value(); }

bool RunIo::can_write() const {
  return health_.may_write(now()) && num_writes_ < kDepth / 2 && free_buffer().has_value();
}

void RunIo::read(Owner& owner, RunIndex run, const Extent& extent,
                 const std::optional<Seal>& seal) {
  start({.direction = IoDirection::kRead,
         .owner = &owner,
         .run = run,
         .extent = extent,
         .bytes = {{}, seal.value_or(Seal{})},
         .is_unit = seal.has_value()});
}

std::span<std::byte> RunIo::next_buffer() const {
  const auto index = free_buffer();
  FT_CHECK(index.has_value());
  return buffer(*index);
}

void RunIo::write(Owner& owner, RunIndex run, const Extent& extent) {
  ++num_writes_;
  start({IoDirection::kWrite, &owner, run, extent});
}

void RunIo::start(const Transfer& transfer) {
  const auto index = free_buffer();
  FT_CHECK(index.has_value() && transfer.extent.bytes <= buffer_bytes_, transfer.extent.bytes);
  if (num_waited_for_++ == 0) last_progress_ = now();
  transfers_[*index] = transfer;
  transfers_[*index]->bytes.bytes = buffer(*index).first(transfer.extent.bytes);
  submit(*index);
}

void RunIo::submit(std::size_t index) {
  Transfer& transfer = *transfers_[index];
  device_->submit({transfer.direction, transfer.extent.offset + transfer.moved,
                   buffer(index).data() + transfer.moved, transfer.extent.bytes - transfer.moved,
                   index, transfer.is_unit ? &transfer.bytes : nullptr});
}

// ---- ending -----------------------------------------------------------------------------------

void RunIo::advance(std::size_t most) {
  for (IoDone& done : device_->completed()) ended_.push_back(std::move(done));
  for (; most > 0 && !ended_.empty(); --most) {
    const IoDone done = std::move(ended_.front());
    ended_.pop_front();
    on_done(done);
  }
}

void RunIo::on_done(const IoDone& done) {
  const auto index = static_cast<std::size_t>(done.tag);
  Transfer& transfer = *transfers_[index];
  last_progress_ = now();
  if (transfer.owner == nullptr) return transfers_[index].reset();
  if (done.bytes && *done.bytes > 0) {
    transfer.moved += *done.bytes;
    if (transfer.moved < transfer.extent.bytes) return submit(index);
    transfer.direction == IoDirection::kRead ? health_.on_read(now()) : health_.on_written(now());
    return end(index, Ok{});
  }
  const Error error =
      done.bytes ? Error{ErrorCode::kIo, "the NVMe file ends before the run"} : done.bytes.error();
  if (error.code == ErrorCode::kExhausted) {
    health_.on_full(now());
  } else if (error.code == ErrorCode::kCorrupt) {
    count_corrupt();
  } else {
    ++faults_.io_errors;
    if (++transfer.tries < kMaxTries) return submit(index);
    health_.on_failed(now());  // one sector that stays bad is not a bad disk
  }
  end(index, Error{error.code, "KV on NVMe: " + error.message});
}

// The owner may begin another transfer at once: the buffer is free when it has been told.
void RunIo::end(std::size_t index, const Status& status) {
  const Transfer transfer = *transfers_[index];
  --num_waited_for_;
  if (transfer.direction == IoDirection::kWrite) {
    --num_writes_;
    transfer.owner->on_written(
        transfer.run, status ? Result<Seal>(transfer.bytes.seal) : Result<Seal>(status.error()));
  } else if (status) {
    transfer.owner->on_read(transfer.run, std::span<const std::byte>(transfer.bytes.bytes));
  } else {
    transfer.owner->on_read(transfer.run, status.error());
  }
  transfers_[index].reset();
}

// What does not end keeps its buffer; its owner goes on without it.
void RunIo::give_up() {
  ++faults_.io_errors;
  health_.on_stalled(now());
  const Error error{ErrorCode::kTimeout, "KV on NVMe: nothing was read or written for " +
                                             std::to_string(kStallLimit.count()) + " s"};
  for (auto& transfer : transfers_) {
    if (!transfer || transfer->owner == nullptr) continue;
    Owner* owner = std::exchange(transfer->owner, nullptr);
    --num_waited_for_;
    if (transfer->direction == IoDirection::kWrite) {
      --num_writes_;
      owner->on_written(transfer->run, error);
    } else {
      owner->on_read(transfer->run, error);
    }
  }
}

void RunIo::wait(TimePoint end) {
  const TimePoint begin = now();
  last_progress_ += begin - std::max(last_wait_, last_progress_);
  wait_since(last_progress_, end);
  last_wait_ = now();
}

void RunIo::wait_since(TimePoint before, TimePoint end) {
  advance();
  if (num_waited_for_ == 0 || last_progress_ != before) return;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(
      std::min(last_progress_ + kStallLimit, end) - now());
  pollfd ready{device_->completion_fd(), POLLIN, 0};
  poll(&ready, 1, std::max(0, static_cast<int>(left.count())));
  advance();
  if (last_progress_ == before && now() >= before + kStallLimit) give_up();
}

bool RunIo::is_waited_for(const Owner& owner) const {
  return std::ranges::any_of(
      transfers_, [&](const auto& transfer) { return transfer && transfer->owner == &owner; });
}

void RunIo::forget(const Owner& owner) {
  while (is_waited_for(owner)) wait();
}

}  // namespace foretoken::kvstore
