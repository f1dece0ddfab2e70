// TierOnFile: an NVMe tier over a file in memory, with a clock of the test's own.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvstore/internal/nvme_tier.h"
#include "tests/kvstore/memory_device.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {

class TierOnFile {
 public:
  // Room for num_slots slabs.
  TierOnFile(FileBytes& file, std::uint32_t num_slots, NvmeReuse reuse = NvmeReuse::kKeepSlabs,
             const ModelIdentity& model = kTestModel)
      : model_(model) {
    IoMemory memory = NvmeTier::make_memory(model);
    auto owned = std::make_unique<MemoryDevice>(file);
    device = owned.get();
    const NvmeGeometry geometry{model.slab_bytes(), num_slots};
    contents = open_contents(*device, memory.bytes(),
                             {model, geometry.file_bytes(), /*default_bytes=*/0, reuse})
                   .value_or_throw();
    tier = std::make_unique<NvmeTier>(std::move(memory), std::move(owned), contents);
  }

  // What store() and load() of an idle tier come to. A miss: nullopt.
  bool store(const SlabName& name) {
    if (!tier->can_store(now) || tier->knows(name)) return false;
    tier->store(name, test_slab(name, model_).data(), now);
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
  bool is_quiet() const { return tier->is_idle() || device->all_held(); }

  ModelIdentity model_;
  std::map<SlabName, std::vector<std::byte>> loading_;  // the tier's until their Loaded
  std::map<SlabName, std::vector<std::byte>> ended_;    // of the last finish()
};

}  // namespace foretoken::kvstore
