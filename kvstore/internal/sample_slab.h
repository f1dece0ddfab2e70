// A slab of random blocks with their checksums, for what measures and tests the tiers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "common/ids.h"
#include "kernels/checksum.h"
#include "kernels/kv_layout.h"

namespace foretoken::kvstore {

inline std::vector<std::byte> sample_slab(const kernels::KvShape& shape, std::uint64_t seed) {
  std::vector<std::byte> slab(shape.slab_bytes());
  std::mt19937_64 random(seed);
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

}  // namespace foretoken::kvstore
