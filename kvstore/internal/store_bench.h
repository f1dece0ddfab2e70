// The NVMe tier's speed on a given folder: `foretoken-kvstore --bench DIR`, `foretoken bench
// store`.
//
// Slabs of the shape are written behind, brought back in random order, and found again by a
// restart; the device alone moves the same bytes with the same sizes and depth beside each. The
// file has no name meanwhile, so that nothing is left of it. Figures are of one run:
// docs/measurements.md keeps those that last.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "kvstore/internal/model_identity.h"

namespace foretoken::kvstore {

struct BenchConfig {
  std::string folder;                                    // as NvmeFile's
  std::uint64_t bytes = std::uint64_t{2} << 30;          // of slabs
  std::uint64_t index_bytes = std::uint64_t{100} << 30;  // of the file whose index is rebuilt: its
                                                         // slabs are holes, its headers are real
  ModelIdentity model{"bench", 8, 32, 128, kernels::DataType::kBf16};  // Llama-3.1-8B's shape
};

// Throws Exception where the folder can't be used or holds KV, or the disk fails.
nlohmann::ordered_json run_store_bench(const BenchConfig& config);

}  // namespace foretoken::kvstore
