#include "kernels/cpu/best_blocks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

namespace foretoken::kernels {
namespace {

// Greater for a greater score, then for a lower candidate. REQUIRES: score is not NaN.
std::uint64_t key_of(float score, std::uint32_t candidate) {
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0F);  // -0 is 0
  const std::uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return (std::uint64_t{ordered} << 32) | (0xFFFFFFFFU - candidate);
}

std::uint32_t candidate_of(std::uint64_t key) {
  return 0xFFFFFFFFU - static_cast<std::uint32_t>(key);
}

void keep_best(std::vector<std::uint64_t>& keys, std::size_t k) {
  if (keys.size() <= k) return;
  std::nth_element(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(k), keys.end(),
                   std::greater<>());
  keys.resize(k);
}

}  // namespace

void HeadChoice::start(int num_candidates) {
  best_.assign(static_cast<std::size_t>(std::max(0, num_candidates)),
               std::numeric_limits<float>::quiet_NaN());
  wanted_.clear();
}

void HeadChoice::want(std::uint32_t candidate, float score) {
  float& best = best_[candidate];
  if (std::isnan(best)) {
    wanted_.push_back(candidate);
    best = score;
  } else {
    best = std::max(best, score);
  }
}

bool HeadChoice::add_best(std::span<const float> scores, int k) {
  keys_.resize(scores.size());
  bool finite = true;
  for (std::uint32_t c = 0; c < scores.size(); ++c) {
    finite &= std::isfinite(scores[c]);
    keys_[c] = key_of(scores[c], c);
  }
  if (!finite) return false;
  keep_best(keys_, static_cast<std::size_t>(k));
  for (const std::uint64_t key : keys_) want(candidate_of(key), scores[candidate_of(key)]);
  return true;
}

void HeadChoice::add_latest(int k) {
  const auto count = static_cast<std::uint32_t>(best_.size());
  const std::uint32_t first = count - std::min(count, static_cast<std::uint32_t>(k));
  for (std::uint32_t c = first; c < count; ++c) want(c, std::numeric_limits<float>::lowest());
}

void HeadChoice::finish(int layer, int num_kv_heads, int kv_head, int limit,
                        const Selection& selection) {
  const auto most = static_cast<std::size_t>(std::min(limit, selection.max_selected));
  if (wanted_.size() > most) {
    keys_.clear();
    for (const std::uint32_t c : wanted_) keys_.push_back(key_of(best_[c], c));
    keep_best(keys_, most);
    wanted_.clear();
    for (const std::uint64_t key : keys_) wanted_.push_back(candidate_of(key));
  }
  std::sort(wanted_.begin(), wanted_.end());
  const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(layer) * num_kv_heads + kv_head;
  std::int32_t* blocks = selection.blocks + head * selection.max_selected;
  for (std::size_t i = 0; i < wanted_.size(); ++i) {
    blocks[i] = static_cast<std::int32_t>(wanted_[i]) + kSinkBlocks;
  }
  selection.counts[head] = static_cast<std::int32_t>(wanted_.size());
}

void HeadChoice::note_segments(std::span<const float> scores,
                               std::span<float> segment_scores) const {
  float lowest = std::numeric_limits<float>::max();
  for (const std::uint32_t c : wanted_) lowest = std::min(lowest, scores[c]);
  if (lowest <= 0) return;
  auto chosen = wanted_.begin();  // sorted
  for (std::uint32_t c = 0; c < scores.size(); ++c) {
    if (chosen != wanted_.end() && *chosen == c) {
      ++chosen;
      continue;
    }
    float& segment = segment_scores[(c + kSinkBlocks) / kSegmentBlocks];
    segment = std::max(segment, scores[c] / lowest);
  }
}

}  // namespace foretoken::kernels
