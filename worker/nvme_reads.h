// NvmeReads: has what a step reads of an outsized sequence (kvstore/outsized_kv.h) in memory before
// the ops that read it: the runs of its fetch lists, or all of a layer for attention that streams
// it.
//
// What is not there when its layer comes is late, and counted. --on-late wait: the step waits for
// it.
// --on-late skip: the step goes on without it, and it comes for a later one; but sink and local
// window are waited for, and so is a sequence's first choice, which nothing has been read ahead of.
//
// Reads fetch lists, so the ops that made them must have run. For the step thread.
#pragma once

#include <vector>

#include "kernels/device.h"
#include "worker/sequence.h"

namespace foretoken::worker {

enum class OnLate { kWait, kSkip };

class NvmeReads {
 public:
  NvmeReads(kernels::Device& device, OnLate on_late) : device_(device), on_late_(on_late) {}

  // All of these do nothing for a sequence that is not outsized.

  // The step's token finds a segment that it may be written to. REQUIRES: its length is not grown.
  void open_segment(Sequence& sequence);
  // A segment that the step has filled goes to NVMe behind. REQUIRES: the step has run.
  void close_segment(Sequence& sequence);

  // Asks for the fetch lists of all layers, in their order, as far as there is room; then for what
  // later steps may want.
  void ask_ahead(Sequence& sequence, kernels::Stream& stream);
  // Before the layer's gather.
  void bring(Sequence& sequence, int layer, kernels::Stream& stream);
  // Before attention that streams the layer.
  void bring_all(Sequence& sequence, int layer);
  // After either.
  void let_go(Sequence& sequence, int layer);

 private:
  // Runs of a layer's fetch list, each once, and how many of its blocks lie in each.
  struct Wanted {
    std::vector<kvstore::HeadSegment> runs;
    std::vector<int> num_blocks;
    std::vector<kvstore::HeadSegment> resident;  // of them, with blocks of sink or local window
  };
  Wanted wanted(const Sequence& sequence, int layer, kernels::Stream& stream);

  kernels::Device& device_;
  const OnLate on_late_;
  std::vector<std::int32_t> counts_;
  std::vector<kernels::FetchEntry> entries_;
};

}  // namespace foretoken::worker
