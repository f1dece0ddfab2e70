#include "kvstore/internal/sealing_device.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "kvstore/internal/file_descriptor.h"
#include "kvstore/internal/sealed_slab.h"

namespace foretoken::kvstore {
namespace {

// One core seals about as fast as an NVMe disk writes; the ranks want the others.
constexpr unsigned kMaxThreads = 4;
unsigned num_threads() {
  return std::clamp(std::thread::hardware_concurrency() / 4, 1U, kMaxThreads);
}

class SealingDevice : public BlockDevice {
 public:
  SealingDevice(std::unique_ptr<BlockDevice> below, std::shared_ptr<const KvCipher> cipher)
      : below_(std::move(below)),
        cipher_(std::move(cipher)),
        name_(std::string(below_->name()) + ", " + std::string(cipher_name(cipher_->kind()))),
        event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        both_(epoll_create1(EPOLL_CLOEXEC)) {
    epoll_event readable{.events = EPOLLIN, .data = {}};
    if (!event_ || !both_ || epoll_ctl(both_.get(), EPOLL_CTL_ADD, event_.get(), &readable) != 0 ||
        epoll_ctl(both_.get(), EPOLL_CTL_ADD, below_->completion_fd(), &readable) != 0) {
      throw Exception(ErrorCode::kIo, "no event for the NVMe tier's encryption");
    }
    for (unsigned i = 0; i < num_threads(); ++i) {
      threads_.emplace_back([this](const std::stop_token& stop) { work(stop); });
    }
  }

  void submit(const IoOperation& operation) override {
    if (operation.unit == nullptr) return below_->submit(operation);
    if (operation.direction == IoDirection::kRead) {
      reads_.emplace(operation.tag, operation);
      return below_->submit(operation);
    }
    if (operation.unit->is_sealed) return below_->submit(operation);  // the rest, or again
    give({operation});
  }

  std::vector<IoDone> completed() override {
    std::vector<IoDone> all;
    eventfd_t count = 0;
    eventfd_read(event_.get(), &count);
    for (Job& job : take_done()) {
      if (job.operation.direction == IoDirection::kWrite) {
        below_->submit(job.operation);
      } else {
        all.push_back({job.operation.tag, std::move(job.bytes)});
      }
    }
    for (IoDone& done : below_->completed()) {
      const auto read = reads_.extract(done.tag);
      if (read && done.bytes && ends_unit(read.mapped(), *done.bytes)) {
        give({read.mapped(), *done.bytes});
      } else {
        all.push_back(std::move(done));
      }
    }
    return all;
  }

  Status resize(std::uint64_t bytes) override { return below_->resize(bytes); }
  Result<std::uint64_t> size() const override { return below_->size(); }
  int completion_fd() const override { return both_.get(); }
  std::string_view name() const override { return name_; }

 private:
  // A write to seal, or a read that has moved `bytes` to open.
  struct Job {
    IoOperation operation;
    Result<std::size_t> bytes = std::size_t{0};
  };

  static bool ends_unit(const IoOperation& operation, std::size_t moved) {
    const std::span<std::byte> unit = operation.unit->bytes;
    return operation.data + moved == unit.data() + unit.size();
  }

  void give(Job job) {
    {
      const std::lock_guard lock(mutex_);
      to_do_.push_back(std::move(job));
    }
    changed_.notify_one();
  }
  std::deque<Job> take_done() {
    const std::lock_guard lock(mutex_);
    return std::exchange(done_, {});
  }

  void work(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (changed_.wait(lock, stop, [this] { return !to_do_.empty(); })) {
      if (stop.stop_requested()) return;
      Job job = std::move(to_do_.front());
      to_do_.pop_front();
      lock.unlock();
      run(job);
      lock.lock();
      done_.push_back(std::move(job));
      eventfd_write(event_.get(), 1);
    }
  }

  void run(Job& job) const {
    SealedUnit& unit = *job.operation.unit;
    const auto moved = static_cast<std::uint64_t>(job.operation.data - unit.bytes.data());
    const std::uint64_t offset = job.operation.offset - moved;
    if (job.operation.direction == IoDirection::kWrite) {
      unit.seal = unit.slab != nullptr ? seal_slab(*cipher_, *unit.slab, unit.bytes, offset)
                                       : cipher_->seal(unit.bytes, place_at(offset));
      unit.is_sealed = true;
    } else if (!opens(unit, offset)) {
      job.bytes =
          Error{ErrorCode::kCorrupt, "KV on NVMe does not open: it was changed, or is another"};
    }
  }

  bool opens(const SealedUnit& unit, std::uint64_t offset) const {
    if (unit.slab != nullptr) return open_slab(*cipher_, *unit.slab, unit.bytes, offset, unit.seal);
    return cipher_->open(unit.bytes, place_at(offset), unit.seal);
  }

  std::unique_ptr<BlockDevice> below_;
  const std::shared_ptr<const KvCipher> cipher_;
  const std::string name_;
  const FileDescriptor event_;                            // done_ has something
  const FileDescriptor both_;                             // it, or the device below
  std::unordered_map<std::uint64_t, IoOperation> reads_;  // in flight, by tag
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Job> to_do_;              // guarded by mutex_
  std::deque<Job> done_;               // guarded by mutex_
  std::vector<std::jthread> threads_;  // last: they use all of the above
};

}  // namespace

std::unique_ptr<BlockDevice> make_sealing_device(std::unique_ptr<BlockDevice> below,
                                                 std::shared_ptr<const KvCipher> cipher) {
  if (!cipher) return below;
  return std::make_unique<SealingDevice>(std::move(below), std::move(cipher));
}

}  // namespace foretoken::kvstore
