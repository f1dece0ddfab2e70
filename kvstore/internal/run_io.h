// RunIo: a rank's own reads and writes of runs in the store's NVMe file, in the slots that the
// store has lent to its sequences; and of what stands beside runs there (slot_table.h). The step
// thread waits here for what its own step needs, and nobody else does.
//
//   io.read(owner, run, {offset, bytes}, seal);     // ends in owner.on_read()
//   std::ranges::copy(bytes, io.next_buffer());
//   io.write(owner, run, {offset, bytes});           // ends in owner.on_written()
//   io.advance();  io.wait();                        // call the owners
//
// Transfers go through the RunIo's own buffers, so that one that never ends holds nothing of the
// arena. What fails is tried again, twice. Where nothing ends for kStallLimit, all that is under
// way fails, and nothing more is begun for a while (NvmeHealth). Only time in wait() counts: what
// is sealed or opened on its way moves on when somebody looks.
//
// Owns the buffers and the device. For one thread. Example: tests/kvstore/outsized_kv_test.cc
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "common/result.h"
#include "kvstore/internal/block_device.h"
#include "kvstore/internal/nvme_health.h"
#include "kvstore/internal/protocol.h"
#include "kvstore/outsized_kv.h"

namespace foretoken::kvstore {

class RunIo {
 public:
  static constexpr int kDepth = 64;  // buffers (guessed: 8 MiB at the 8B shape)
  static constexpr std::chrono::seconds kStallLimit{2};

  struct Extent {
    std::uint64_t offset = 0;
    std::size_t bytes = 0;  // at most buffer_bytes
  };

  // Whose run it is hears of the end, from within advance() and wait().
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void on_read(RunIndex run, const Result<std::span<const std::byte>>& bytes) = 0;
    // The seal is read() with, where the device seals.
    virtual void on_written(RunIndex run, const Result<Seal>& written) = 0;
  };

  // REQUIRES: memory has kDepth buffers.
  RunIo(IoMemory memory, std::unique_ptr<BlockDevice> device, std::size_t buffer_bytes);

  bool can_read() const;
  bool can_write() const;  // leaves half of the buffers to reads
  // Something will end, for whichever owner: its buffer may then be another one's.
  bool is_busy() const { return num_waited_for_ > 0; }
  // `run` is the owner's name for it; seal: what on_written() gave, nullopt: the bytes come as they
  // lie on the disk. REQUIRES: can_read().
  void read(Owner& owner, RunIndex run, const Extent& extent, const std::optional<Seal>& seal);
  // What write() will write. REQUIRES: can_write().
  std::span<std::byte> next_buffer() const;
  void write(Owner& owner, RunIndex run, const Extent& extent);

  // Takes what has ended, `most` transfers of it.
  void advance(std::size_t most = std::numeric_limits<std::size_t>::max());
  // The same, but waits for an end where there is none yet: kStallLimit at most, and until `end`.
  void wait(TimePoint end = TimePoint::max());
  // What an owner has read is not what it wrote: it has the checksums.
  void count_corrupt() { ++faults_.checksum_failures; }
  // All that has gone wrong since the last call.
  NvmeFaults take_faults() { return std::exchange(faults_, {}); }
  // The owner ends. Waits for what is under way for it, kStallLimit at most.
  void forget(const Owner& owner);

 private:
  struct Transfer {
    IoDirection direction = IoDirection::kRead;
    Owner* owner = nullptr;  // null: it only keeps its buffer until it ends
    RunIndex run{};
    Extent extent;
    std::size_t moved = 0;
    int tries = 0;
    SealedUnit bytes{};   // in its buffer
    bool is_unit = true;  // else the device neither seals nor opens them
  };

  std::span<std::byte> buffer(std::size_t index) const;
  std::optional<std::size_t> free_buffer() const;
  void start(const Transfer& transfer);
  void submit(std::size_t index);
  void on_done(const IoDone& done);
  void end(std::size_t index, const Status& status);
  void wait_since(TimePoint before, TimePoint end);
  void give_up();
  bool is_waited_for(const Owner& owner) const;

  IoMemory memory_;
  std::vector<std::optional<Transfer>> transfers_;  // by buffer
  std::unique_ptr<BlockDevice> device_;             // behind both: it uses them until it is gone
  const std::size_t buffer_bytes_;
  std::deque<IoDone> ended_;  // and not taken yet
  int num_waited_for_ = 0;    // that have an owner
  int num_writes_ = 0;        // of them
  NvmeHealth health_;
  NvmeFaults faults_;
  TimePoint last_progress_{};  // later by the time in which nobody waited
  TimePoint last_wait_{};      // its end
};

}  // namespace foretoken::kvstore
