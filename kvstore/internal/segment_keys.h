// SegmentKeys: of a sequence's first segments, as far as they are known: what its reserve named,
// and one more with each commit of the next.
#pragma once

#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "common/prefix_key.h"

namespace foretoken::kvstore {

class SegmentKeys {
 public:
  SegmentKeys() = default;
  explicit SegmentKeys(std::vector<PrefixKey> keys) : keys_(std::move(keys)) {}

  void note(int segment, const PrefixKey& key) {
    if (static_cast<std::size_t>(segment) == keys_.size()) keys_.push_back(key);
  }
  // Of the segment on which this one builds.
  std::optional<PrefixKey> before(int segment) const {
    if (segment == 0 || static_cast<std::size_t>(segment) > keys_.size()) return std::nullopt;
    return keys_[static_cast<std::size_t>(segment - 1)];
  }

 private:
  std::vector<PrefixKey> keys_;
};

}  // namespace foretoken::kvstore
