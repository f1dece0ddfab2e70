// Partition: which part of the model a tensor-parallel rank holds.
//
// KV heads are split in order, the first ranks taking one more where they don't divide
// (3 heads over 2 ranks: 2 + 1). Query heads follow their KV head. Where ranks outnumber KV heads,
// a head's query heads are split over the ranks that share it; the lowest of them writes its KV,
// but for outsized sequences, whose KV each rank keeps for itself.
// MLP columns and vocabulary are split evenly, with a remainder.
// Example: tests/worker/partition_test.cc
#pragma once

#include <cstdint>

#include "common/model_config.h"
#include "common/result.h"

namespace foretoken::worker {

struct Range {
  int begin = 0;
  int count = 0;
  int end() const { return begin + count; }
};

struct Partition {
  int rank = 0;
  int world_size = 1;
  Range kv_heads;         // of the model's
  Range heads;            // query heads of the model's; kv_heads.count divides heads.count
  bool writes_kv = true;  // false where a lower rank writes this rank's only KV head
  Range intermediate;
  Range vocab;
};

// Error: kConfig when the model has too few heads for world_size ranks.
Result<Partition> make_partition(const ModelConfig& model, int rank, int world_size);

// Part `index` of `total` split into `parts`, in units of `unit` where that divides the total.
Range split_evenly(int total, int parts, int index, int unit = 1);

}  // namespace foretoken::worker
