// Works on a folder's NVMe file as a store does until it is killed: stores slabs, lends slots and
// publishes what they are filled with, refutes slabs, saves uses, scrubs, in random order.
//   slab_writer FOLDER SEED KEY_FILE [POINT COUNT]
// KEY_FILE: of an encrypted file, else empty. POINT, COUNT: dies at the point of this name, when it
// comes there for the COUNT-th time. Writes the number of each slab to stdout (uint32) once the
// tier has it.
#include <poll.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <span>
#include <string>

#include "common/check.h"
#include "common/log.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/sealed_slab.h"
#include "kvstore/internal/sealing_device.h"
#include "kvstore/internal/slot_table.h"
#include "tests/kvstore/dying_device.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {
namespace {

using std::chrono::milliseconds;

const DeathPoint& point_of(std::string_view name) {
  for (const std::span<const DeathPoint> points :
       {std::span<const DeathPoint>(kDeathPoints), std::span<const DeathPoint>(kLayoutPoints)}) {
    const auto point = std::ranges::find(points, name, &DeathPoint::name);
    if (point != points.end()) return *point;
  }
  FT_CHECK(false, name);
  std::abort();
}

class Writer {
 public:
  // `death`: POINT and COUNT, or nothing.
  Writer(const NvmeFile& file, unsigned seed, std::span<char* const> death,
         std::shared_ptr<const KvCipher> cipher)
      : cipher_(std::move(cipher)),
        random_(seed),
        slot_(slot_bytes(kTestModel.slab_shape(), cipher_ != nullptr)),
        rank_device_(dying(file, death, slot_, /*depth=*/1)) {
    IoMemory memory = NvmeTier::make_memory(kTestModel);
    auto disk = dying(file, death, memory, NvmeTier::depth(kTestModel));
    during_ = disk->size().value_or_throw() == 0 ? During::kLayout : During::kOpening;
    auto device = make_sealing_device(std::move(disk), cipher_);
    const auto contents =
        open_contents(*device, memory.bytes(), kill_test_opening(cipher_)).value_or_throw();
    tier_ = std::make_unique<NvmeTier>(std::move(memory), std::move(device), contents, cipher_);
  }

  void step() {
    switch (random_() % 8) {
      case 0:
        return lend();
      case 1:
        return publish();
      case 2:
        return refute();
      case 3:
        return save_uses();
      case 4:
        return scrub();
      default:
        return store();
    }
  }

 private:
  TimePoint now() const { return std::chrono::steady_clock::now() + skipped_; }

  std::unique_ptr<BlockDevice> dying(const NvmeFile& file, std::span<char* const> death,
                                     const IoMemory& memory, int depth) const {
    auto disk = make_block_device(file.fd(), memory, depth);
    if (death.empty()) return disk;
    return std::make_unique<DyingDevice>(std::move(disk), kill_test_geometry(cipher_ != nullptr),
                                         during_, point_of(death[0]), std::atoi(death[1]));
  }

  void finish() {
    while (!tier_->is_idle()) {
      static_cast<void>(tier_->advance(now()));
      pollfd ready{tier_->completion_fd(), POLLIN, 0};
      if (!tier_->is_idle() && !tier_->has_more()) poll(&ready, 1, 10);
    }
  }

  bool is_full() const {
    const NvmeStat stat = tier_->stat();
    return stat.slabs_held == stat.slabs_total;
  }

  void store_slab(const SlabName& name, const std::optional<PrefixKey>& previous) {
    FT_CHECK(tier_->can_store(now()) && !tier_->knows(name));
    tier_->store(name, test_slab(name).data(), now(), previous);
    finish();
  }
  // Every other one builds on the one before it.
  void store() {
    const auto number = static_cast<std::uint32_t>(random_());
    std::optional<PrefixKey> previous;
    if (!told_.empty() && !was_chained_) previous = told_.back();
    was_chained_ = previous.has_value();
    during_ = is_full() ? During::kGivingWay : During::kStore;
    if (previous && random_() % 2 == 0) during_ = During::kChainedStore;
    store_slab(test_name(0, number), previous);
    tell(number);
  }

  std::vector<SlotIndex> lend_slots(std::size_t count) {
    during_ = During::kLending;
    auto slots = tier_->lend(count, now());
    FT_CHECK(slots.has_value());
    finish();
    return *std::move(slots);
  }
  void lend() { tier_->take_back(lend_slots(kLentSlots)); }

  // As a rank does with a segment of a sequence that is larger than the arena.
  void publish() {
    const std::vector<SlotIndex> slots = lend_slots(1);
    during_ = During::kPublishing;
    const auto number = static_cast<std::uint32_t>(random_());
    tier_->publish(test_name(0, number), fill(slots.front(), number), now());
    finish();
    tier_->take_back(slots);
    was_chained_ = false;
    tell(number);
  }
  NvmeTier::Filled fill(SlotIndex slot, std::uint32_t number) {
    const kernels::KvShape shape = kTestModel.slab_shape();
    const std::uint64_t offset = kill_test_geometry(cipher_ != nullptr).slab_offset(slot);
    const std::span<std::byte> bytes = slot_.bytes();
    std::ranges::copy(test_slab(test_name(0, number)), bytes.begin());
    SlotTable table(shape, /*is_sealed=*/false);
    table.decode(bytes.subspan(shape.slab_payload_bytes()));
    NvmeTier::Filled filled{slot, table.digest(), {}};
    if (cipher_) filled.seal = seal_slab(*cipher_, shape, bytes, offset);
    rank_device_->submit({IoDirection::kWrite, offset, bytes.data(), bytes.size()});
    for (;;) {
      pollfd ready{rank_device_->completion_fd(), POLLIN, 0};
      poll(&ready, 1, 1'000);
      const auto ended = rank_device_->completed();
      if (ended.empty()) continue;
      FT_CHECK(ended.front().bytes && *ended.front().bytes == bytes.size());
      return filled;
    }
  }

  // Of a slab that nobody was told of.
  void refute() {
    const SlabName name = test_name(0, static_cast<std::uint32_t>(random_()));
    during_ = is_full() ? During::kGivingWay : During::kStore;
    store_slab(name, std::nullopt);
    const SlotIndex slot = tier_->borrow(name);
    during_ = During::kRefuting;
    tier_->refute(slot, now());
    finish();
    tier_->take_back(std::span(&slot, 1));
  }

  void save_uses() {
    during_ = During::kSavingUses;
    const std::size_t count = std::min<std::size_t>(told_.size(), kSavedUses);
    for (const PrefixKey& key : std::span(told_).last(count)) tier_->note_use({&key, 1});
    tier_->save_uses(now());
    finish();
  }

  // The pause between two is over.
  void scrub() {
    during_ = During::kScrubbing;
    skipped_ += milliseconds(500);
    static_cast<void>(tier_->advance(now()));
    finish();
  }

  void tell(std::uint32_t number) {
    told_.push_back(test_name(0, number).key);
    if (write(STDOUT_FILENO, &number, sizeof number) != sizeof number) _exit(1);
  }

  const std::shared_ptr<const KvCipher> cipher_;
  std::mt19937 random_;
  During during_ = During::kLayout;
  milliseconds skipped_{0};
  std::vector<PrefixKey> told_;
  bool was_chained_ = false;
  IoMemory slot_;
  std::unique_ptr<BlockDevice> rank_device_;
  std::unique_ptr<NvmeTier> tier_;
};

}  // namespace
}  // namespace foretoken::kvstore

int main(int argc, char** argv) {
  using namespace foretoken::kvstore;
  if (argc != 4 && argc != 6) return 2;
  alarm(60);                                       // where nobody kills it
  foretoken::log().set_level(spdlog::level::err);  // what is refuted is logged
  const std::string key_file = argv[3];
  const NvmeFile file(argv[1]);
  Writer writer(file, static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10)),
                std::span(argv, static_cast<std::size_t>(argc)).subspan(4),
                key_file.empty() ? nullptr : KvCipher::from_file(key_file));
  for (;;) writer.step();
}
