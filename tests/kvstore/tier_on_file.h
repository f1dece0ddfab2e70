// TierOnFile: an NVMe tier over a file in memory, with a clock of the test's own.
#pragma once

#include <chrono>
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
    if (!tier->has(name, now)) return std::nullopt;
    std::vector<std::byte> slab(model_.slab_bytes());
    tier->load(name, slab.data(), now);
    const auto loaded = finish();
    if (loaded.size() != 1 || !loaded.front().is_whole) return std::nullopt;
    return slab;
  }
  // Until nothing has ended that was not looked at.
  std::vector<NvmeTier::Loaded> finish() {
    std::vector<NvmeTier::Loaded> all;
    do {
      for (auto& loaded : tier->advance(now)) all.push_back(loaded);
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
};

}  // namespace foretoken::kvstore
