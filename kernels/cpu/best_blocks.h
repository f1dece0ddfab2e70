// Choosing blocks by score: the k best a map, united over the maps of a KV head.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/device.h"
#include "kernels/kept_blocks.h"

namespace foretoken::kernels {

// What the maps of one KV head want of the candidates, which are the columns from kSinkBlocks on.
// One a thread: it keeps its memory from head to head.
class HeadChoice {
 public:
  void start(int num_candidates);

  // A map's k best; ties go to the lower column; with fewer than k candidates, all.
  // False, and nothing is chosen, if a score is not finite.
  bool add_best(std::span<const float> scores, int k);
  // A map without usable scores: the k latest columns. They yield to scored ones in finish().
  void add_latest(int k);

  // Writes the union to (layer, kv_head) of the selection, sorted: at most `limit` blocks, those
  // of the best scores of any map.
  void finish(int layer, int num_kv_heads, int kv_head, int limit, const Selection& selection);

  // After finish(): a map's part of (layer, kv_head) of the selection's segment_scores.
  void note_segments(std::span<const float> scores, std::span<float> segment_scores) const;

 private:
  void want(std::uint32_t candidate, float score);

  std::vector<float> best_;            // by candidate; lowest() if only the latest, NaN if none
  std::vector<std::uint32_t> wanted_;  // candidates of the union
  std::vector<std::uint64_t> keys_;    // scratch
};

}  // namespace foretoken::kernels
