// Slabs whose every byte follows from their name: what a tier must give back or do without.
#pragma once

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "common/ids.h"
#include "kvstore/internal/nvme_contents.h"
#include "kvstore/internal/nvme_format.h"
#include "kvstore/internal/sample_slab.h"

namespace foretoken::kvstore {

inline const ModelIdentity kTestModel{"test-model", 3, 2, 32, kernels::DataType::kFp16};

// Of the file that slab_writer writes to and nvme_kill_test reads.
inline NvmeGeometry kill_test_geometry(bool is_sealed) {
  return {slot_bytes(kTestModel.slab_shape(), is_sealed), 64};
}
inline constexpr std::size_t kLentSlots = 2;  // that the writer gives back empty
inline constexpr std::size_t kSavedUses = 3;  // of what it wrote last
inline NvmeOpening kill_test_opening(const std::shared_ptr<const KvCipher>& cipher) {
  return {kTestModel, kill_test_geometry(cipher != nullptr).file_bytes(), 0, NvmeReuse::kKeepSlabs,
          cipher};
}

inline SlabName test_name(int head, std::uint32_t number) {
  SlabName name{head, {}};
  std::memcpy(name.key.bytes.data(), &number, sizeof number);
  return name;
}

inline std::vector<std::byte> test_slab(const SlabName& name,
                                        const ModelIdentity& model = kTestModel) {
  return sample_slab(model.slab_shape(), std::hash<SlabName>()(name));
}

// Blocks and checksums; the padding behind them is nobody's.
inline bool same_slab(const std::byte* slab, const SlabName& name,
                      const ModelIdentity& model = kTestModel) {
  const kernels::KvShape shape = model.slab_shape();
  const std::size_t bytes =
      shape.slab_payload_bytes() +
      std::size_t{8} * kSegmentBlocks * static_cast<std::size_t>(shape.num_layers);
  return std::memcmp(slab, test_slab(name, model).data(), bytes) == 0;
}

}  // namespace foretoken::kvstore
