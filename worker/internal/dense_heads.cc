#include "worker/dense_heads.h"

#include <algorithm>
#include <cstddef>

namespace foretoken::worker {

std::vector<DenseHead> choose_dense_heads(std::span<const std::span<const float>> recalls,
                                          float least, int most) {
  std::vector<DenseHead> low;
  const auto recall = [&](const DenseHead& head) {
    return recalls[static_cast<std::size_t>(head.row)][static_cast<std::size_t>(head.index)];
  };
  for (int row = 0; row < std::ssize(recalls); ++row) {
    for (int index = 0; index < std::ssize(recalls[static_cast<std::size_t>(row)]); ++index) {
      if (const DenseHead head{row, index}; recall(head) < least) low.push_back(head);
    }
  }
  std::ranges::stable_sort(low, {}, recall);
  if (std::ssize(low) > most) low.resize(static_cast<std::size_t>(most));
  return low;
}

}  // namespace foretoken::worker
