// Slabs whose every byte follows from their name: what a tier must give back or do without.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "common/ids.h"
#include "kernels/checksum.h"
#include "kvstore/internal/nvme_format.h"

namespace foretoken::kvstore {

inline const ModelIdentity kTestModel{"test-model", 3, 2, 32, kernels::DataType::kFp16};

// Of the file that slab_writer writes to and nvme_kill_test reads.
inline NvmeGeometry kill_test_geometry() { return {kTestModel.slab_bytes(), 64}; }

inline SlabName test_name(int head, std::uint32_t number) {
  SlabName name{head, {}};
  std::memcpy(name.key.bytes.data(), &number, sizeof number);
  return name;
}

inline std::vector<std::byte> test_slab(const SlabName& name,
                                        const ModelIdentity& model = kTestModel) {
  const kernels::KvShape shape = model.slab_shape();
  std::vector<std::byte> slab(shape.slab_bytes());
  std::mt19937_64 random(std::hash<SlabName>()(name));
  for (std::size_t at = 0; at < shape.slab_payload_bytes(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(slab.data() + at, &word, sizeof word);
  }
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    for (int block = 0; block < kSegmentBlocks; ++block) {
      const std::uint64_t checksum =
          kernels::block_checksum(slab.data() + kernels::slab_block_offset(shape, layer, block),
                                  shape.block_bytes(), layer, block);
      std::memcpy(slab.data() + kernels::slab_checksum_offset(shape, layer, block), &checksum,
                  sizeof checksum);
    }
  }
  return slab;
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
