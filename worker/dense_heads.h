// Which heads of a batch attend all blocks in a step, because the last audit found that their
// choice keeps too little attention.
#pragma once

#include <span>
#include <vector>

namespace foretoken::worker {

struct DenseHead {
  int row = 0;    // of the batch
  int index = 0;  // layer * num_kv_heads + KV head
  bool operator==(const DenseHead&) const = default;
};

// recalls: of each row, what the last audit found [num_layers * num_kv_heads]. Those below `least`,
// the lowest first, at most `most` of the whole batch.
std::vector<DenseHead> choose_dense_heads(std::span<const std::span<const float>> recalls,
                                          float least, int most);

}  // namespace foretoken::worker
