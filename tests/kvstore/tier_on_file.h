// TierOnFile: an NVMe tier over a file in memory, with a clock of the test's own.
#pragma once

#include <poll.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/sealing_device.h"
#include "tests/kvstore/memory_device.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {

class TierOnFile {
 public:
  // Room for num_slots slabs.
  TierOnFile(FileBytes& file, std::uint32_t num_slots, NvmeReuse reuse = NvmeReuse::kKeepSlabs,
             const ModelIdentity& model = kTestModel,
             std::shared_ptr<const KvCipher> cipher = nullptr,
             std::function<IoFault(const IoOperation&)> fault = nullptr)
      : model_(model), is_sealed_(cipher != nullptr) {
    IoMemory memory = NvmeTier::make_memory(model);
    auto owned = std::make_unique<MemoryDevice>(file);
    device = owned.get();
    device->fault = std::move(fault);
    const NvmeGeometry geometry{slot_bytes(model.slab_shape(), cipher != nullptr), num_slots};
    contents = open_contents(*device, memory.bytes(),
                             {model, geometry.file_bytes(), /*default_bytes=*/0, reuse, cipher})
                   .value_or_throw();
    auto sealing = make_sealing_device(std::move(owned), cipher);
    tier = std::make_unique<NvmeTier>(std::move(memory), std::move(sealing), contents, cipher);
  }

  // What store() and load() of an idle tier come to. A miss: nullopt.
  bool store(const SlabName& name, const std::optional<PrefixKey>& previous = std::nullopt) {
    if (!tier->can_store(now) || tier->knows(name)) return false;
    if (!tier->store(name, test_slab(name, model_).data(), now, previous)) return false;
    finish();
    return tier->knows(name);
  }
  std::optional<std::vector<std::byte>> load(const SlabName& name) {
    if (loading_.contains(name) || !tier->has(name, now)) return std::nullopt;
    loading_[name].resize(model_.slab_bytes());
    tier->load(name, loading_[name].data(), now);
    for (const auto& loaded : finish()) {
      if (loaded.name == name && loaded.is_whole) return std::move(ended_.at(name));
    }
    return std::nullopt;
  }
  // Until nothing has ended that was not looked at.
  std::vector<NvmeTier::Loaded> finish() {
    std::vector<NvmeTier::Loaded> all;
    ended_.clear();
    do {
      for (auto& loaded : tier->advance(now)) {
        all.push_back(loaded);
        if (auto room = loading_.extract(loaded.name)) ended_.insert(std::move(room));
      }
    } while (tier->has_more() || !is_quiet());
    tier->check();
    return all;
  }
  void wait(std::chrono::milliseconds time) { now += time; }

  TimePoint now{std::chrono::hours(1)};
  MemoryDevice* device = nullptr;
  NvmeContents contents;
  std::unique_ptr<NvmeTier> tier;

 private:
  // A store's header follows its slab, so one more look is due while operations end.
  // Sealing ends when it ends: a slab of the test's takes far less than it is waited for.
  bool is_quiet() const {
    if (tier->is_idle() || !device->all_held()) return tier->is_idle();
    pollfd ready{tier->completion_fd(), POLLIN, 0};
    return !is_sealed_ || poll(&ready, 1, 100) == 0;
  }

  ModelIdentity model_;
  bool is_sealed_;
  std::map<SlabName, std::vector<std::byte>> loading_;  // the tier's until their Loaded
  std::map<SlabName, std::vector<std::byte>> ended_;    // of the last finish()
};

}  // namespace foretoken::kvstore
