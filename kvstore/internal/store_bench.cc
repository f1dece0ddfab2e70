#include "kvstore/internal/store_bench.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/ids.h"
#include "kernels/checksum.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/sample_slab.h"

namespace foretoken::kvstore {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kSeed = 20261124;
constexpr std::size_t kSources = 8;  // slabs that are written, again and again

double seconds_of(const std::function<void()>& body) {
  const auto begin = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double gb_per_s(double bytes, double seconds) { return bytes / seconds / 1e9; }

void wait_for(int event) {
  pollfd ready{event, POLLIN, 0};
  if (poll(&ready, 1, 10'000) != 1) {
    throw Exception(ErrorCode::kIo, "the disk has not answered for 10 s");
  }
}

SlabName name_of(std::uint32_t number) {
  SlabName name;
  std::memcpy(name.key.bytes.data(), &number, sizeof number);
  return name;
}

// Has no name: it is gone however the bench ends, and nobody's KV is in it.
NvmeFile make_nameless_file(const std::string& folder) {
  NvmeFile file(folder);
  if (file.allocated_bytes() > 0) {
    throw Exception(ErrorCode::kConfig, folder +
                                            " holds KV (kv-slabs), which the bench would "
                                            "overwrite: give it a folder of its own");
  }
  file.remove();
  return file;
}

class StoreBench {
 public:
  explicit StoreBench(const BenchConfig& config)
      : config_(config),
        file_(make_nameless_file(config.folder)),
        shape_(config.model.slab_shape()),
        geometry_(NvmeGeometry::fit(config.bytes, shape_.slab_bytes())),
        order_(geometry_.num_slots) {
    std::iota(order_.begin(), order_.end(), 0U);
    std::ranges::shuffle(order_, std::mt19937(kSeed));
    for (std::size_t i = 0; i < kSources; ++i) slabs_.push_back(sample_slab(shape_, i));
  }

  Json run() {
    const auto total = static_cast<double>(slab_bytes() * geometry_.num_slots);
    Json json = {{"bench", "store"},
                 {"slab_bytes", slab_bytes()},
                 {"slabs", geometry_.num_slots},
                 {"depth", NvmeTier::depth(config_.model)}};
    open(NvmeReuse::kStartAfresh, geometry_);
    json["write_behind_gb_per_s"] =
        gb_per_s(total, seconds_of([&] { store_all(geometry_.num_slots); }));
    json["write_behind_full_gb_per_s"] = gb_per_s(total, seconds_of([&] { store_all(0); }));
    json["promote_gb_per_s"] = gb_per_s(total, seconds_of([&] { load_all(); }));
    json["turn_p99_ms"] = turn_p99_ms();
    tier_.reset();
    json["reopen_ms"] = 1e3 * seconds_of([&] { open(NvmeReuse::kKeepSlabs, geometry_); });
    json["prefix_hit_after_reopen_gb_per_s"] = gb_per_s(total, seconds_of([&] { load_all(); }));
    const NvmeStat stat = tier_->stat();
    FT_CHECK(stat.slabs_read == geometry_.num_slots, stat.slabs_read, geometry_.num_slots);
    tier_.reset();
    add_encrypted(json);
    json["device_write_gb_per_s"] = gb_per_s(total, device_seconds(IoDirection::kWrite));
    json["device_read_gb_per_s"] = gb_per_s(total, device_seconds(IoDirection::kRead));
    add_checksum(json);
    add_index(json);
    return json;
  }

 private:
  std::size_t slab_bytes() const { return shape_.slab_bytes(); }

  void open(NvmeReuse reuse, const NvmeGeometry& geometry,
            std::shared_ptr<const KvCipher> cipher = nullptr) {
    tier_ =
        NvmeTier::open(file_, {config_.model, geometry.file_bytes(), 0, reuse, std::move(cipher)})
            .value_or_throw();
    turns_.clear();
  }

  // What the store's loop has done nothing else for.
  template <typename Turn>
  auto timed(const Turn& turn) {
    const auto begin = Clock::now();
    auto result = turn();
    turns_.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
    return result;
  }
  double turn_p99_ms() {
    if (turns_.empty()) return 0;
    const auto at = turns_.begin() + static_cast<std::ptrdiff_t>(turns_.size() * 99 / 100);
    std::ranges::nth_element(turns_, at);
    return *at;
  }

  // The same tier, encrypted, and one core's sealing and opening of a slab.
  void add_encrypted(Json& json) {
    const auto total = static_cast<double>(slab_bytes() * geometry_.num_slots);
    const auto cipher = KvCipher::random();
    json["cipher"] = cipher_name(cipher->kind());
    open(NvmeReuse::kStartAfresh, {slot_bytes(shape_, /*is_sealed=*/true), geometry_.num_slots},
         cipher);
    json["encrypted_write_behind_gb_per_s"] =
        gb_per_s(total, seconds_of([&] { store_all(geometry_.num_slots); }));
    json["encrypted_write_behind_full_gb_per_s"] =
        gb_per_s(total, seconds_of([&] { store_all(0); }));
    json["encrypted_promote_gb_per_s"] = gb_per_s(total, seconds_of([&] { load_all(); }));
    json["encrypted_turn_p99_ms"] = turn_p99_ms();
    FT_CHECK(tier_->stat().slabs_read == geometry_.num_slots, tier_->stat().slabs_read);
    tier_.reset();
    const auto sealed_bytes = static_cast<double>(slab_bytes() * slabs_.size());
    std::vector<Seal> seals;
    json["seal_gb_per_s"] = gb_per_s(sealed_bytes, seconds_of([&] {
                                       for (auto& slab : slabs_) {
                                         seals.push_back(cipher->seal(slab, {}));
                                       }
                                     }));
    json["open_gb_per_s"] = gb_per_s(sealed_bytes, seconds_of([&] {
                                       for (std::size_t i = 0; i < kSources; ++i) {
                                         FT_CHECK(cipher->open(slabs_[i], {}, seals[i]));
                                       }
                                     }));
  }

  // What has ended, after waiting for something to do so.
  std::vector<NvmeTier::Loaded> advance() {
    if (!tier_->has_more()) wait_for(tier_->completion_fd());
    return timed([this] { return tier_->advance(Clock::now()); });
  }

  // Slabs [first, first + num_slots): the second time others give way.
  void store_all(std::uint32_t first) {
    const std::int64_t before = tier_->stat().slabs_written;
    for (std::uint32_t i = 0; i < geometry_.num_slots; ++i) {
      while (!tier_->can_store(Clock::now())) advance();
      tier_->store(name_of(first + i), slabs_[i % kSources].data(), Clock::now());
    }
    while (!tier_->is_idle()) advance();
    if (tier_->stat().slabs_written - before < geometry_.num_slots) {
      throw Exception(ErrorCode::kIo, "the disk did not take all slabs");
    }
  }

  // In random order: slabs of a prefix lie where there was room.
  void load_all() {
    std::vector<std::vector<std::byte>> room(
        2 * static_cast<std::size_t>(NvmeTier::depth(config_.model)),
        std::vector<std::byte>(slab_bytes()));
    std::size_t in_flight = 0;
    for (std::size_t i = 0; i < order_.size(); ++i) {
      while (in_flight >= room.size()) in_flight -= advance().size();
      tier_->load(name_of(order_[i]), room[i % room.size()].data(), Clock::now());
      ++in_flight;
    }
    while (in_flight > 0) in_flight -= advance().size();
  }

  // The same operations without a tier.
  double device_seconds(IoDirection direction) {
    IoMemory memory = NvmeTier::make_memory(config_.model);
    const auto depth = static_cast<std::size_t>(NvmeTier::depth(config_.model));
    const auto device = make_block_device(file_.fd(), memory, static_cast<int>(depth));
    std::size_t next = 0;
    const auto submit = [&](std::uint64_t buffer) {
      device->submit({direction, geometry_.slab_offset(SlotIndex{order_[next++]}),
                      memory.bytes().data() + buffer * (slab_bytes() + kSectorBytes), slab_bytes(),
                      buffer});
    };
    return seconds_of([&] {
      std::size_t ended = 0;
      while (next < std::min(depth, order_.size())) submit(next);
      while (ended < order_.size()) {
        wait_for(device->completion_fd());
        for (const IoDone& done : device->completed()) {
          if (!done.bytes) throw Exception(done.bytes.error());
          ++ended;
          if (next < order_.size()) submit(done.tag);
        }
      }
    });
  }

  // One core's copy with its proof, which each slab passes once.
  void add_checksum(Json& json) {
    std::vector<std::byte> to(slab_bytes());
    const double seconds = seconds_of([&] {
      for (const auto& slab : slabs_) {
        for (int layer = 0; layer < shape_.num_layers; ++layer) {
          for (int block = 0; block < kSegmentBlocks; ++block) {
            const std::size_t at = kernels::slab_block_offset(shape_, layer, block);
            kernels::copy_with_checksum(to.data() + at, slab.data() + at, shape_.block_bytes(),
                                        layer, block);
          }
        }
      }
    });
    json["checked_copy_gb_per_s"] =
        gb_per_s(static_cast<double>(slab_bytes() * slabs_.size()), seconds);
  }

  // A large file's headers: what a restart reads.
  void add_index(Json& json) {
    const auto geometry = NvmeGeometry::fit(config_.index_bytes, slab_bytes());
    open(NvmeReuse::kStartAfresh, geometry);
    tier_.reset();
    write_headers(geometry);
    json["index_gib"] = static_cast<double>(geometry.file_bytes()) / (1 << 30);
    json["index_slabs"] = geometry.num_slots;
    json["index_rebuild_ms"] = 1e3 * seconds_of([&] { open(NvmeReuse::kKeepSlabs, geometry); });
    FT_CHECK(tier_->stat().slabs_held == geometry.num_slots, tier_->stat().slabs_held);
    tier_.reset();
  }

  void write_headers(const NvmeGeometry& geometry) {
    constexpr std::uint32_t kStep = 256;
    IoMemory memory(kStep * kSectorBytes);
    const auto device = make_block_device(file_.fd(), memory, 1);
    const auto superblock = read_superblock(*device, memory.bytes()).value_or_throw();
    for (std::uint32_t slot = 0; slot < geometry.num_slots; slot += kStep) {
      const std::uint32_t count = std::min(kStep, geometry.num_slots - slot);
      for (std::uint32_t i = 0; i < count; ++i) {
        encode(
            SlotHeader{
                SlotIndex{slot + i}, superblock.file_id, 1, slot + i + 1, 0, name_of(slot + i), {}},
            memory.bytes().subspan(i * kSectorBytes).first<kSectorBytes>());
      }
      device->submit({IoDirection::kWrite, geometry.header_offset(SlotIndex{slot}),
                      memory.bytes().data(), count * kSectorBytes, 0});
      wait_for(device->completion_fd());
      for (const IoDone& done : device->completed()) {
        if (!done.bytes) throw Exception(done.bytes.error());
      }
    }
  }

  BenchConfig config_;
  NvmeFile file_;
  kernels::KvShape shape_;
  NvmeGeometry geometry_;
  std::vector<std::uint32_t> order_;
  std::vector<std::vector<std::byte>> slabs_;
  std::unique_ptr<NvmeTier> tier_;
  std::vector<double> turns_;  // milliseconds, since the last open()
};

}  // namespace

Json run_store_bench(const BenchConfig& config) {
  if (NvmeGeometry::fit(config.bytes, config.model.slab_bytes()).num_slots == 0) {
    throw Exception(ErrorCode::kUsage, "the bench needs room for a slab of " +
                                           std::to_string(config.model.slab_bytes()) + " bytes");
  }
  return StoreBench(config).run();
}

}  // namespace foretoken::kvstore
