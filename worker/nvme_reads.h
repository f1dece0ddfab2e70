// NvmeReads: has what a step reads of an outsized sequence (kvstore/outsized_kv.h) in memory before
// the ops that read it: the runs of its fetch lists, or all of a layer for attention that streams
// it.
//
// Either all that a step reads is there before the step begins (bring_step), so that the step may
// run without the host; or a layer's is there before the layer (bring, bring_all, let_go).
//
// What is not there then is late, and counted. --on-late wait: the step waits for it. --on-late
// skip: the step goes on without it, and it comes for a later one; but sink and local window are
// waited for, and so is a sequence's first choice, which nothing has been read ahead of.
//
// Reads fetch lists (Sequence::host_fetches), so their copies must be through. All but start()
// change what ops read: REQUIRES that no op in flight reads the sequence's KV in the arena. Does
// nothing for a sequence that is not outsized. For the step thread.
#pragma once

#include <span>
#include <vector>

#include "kernels/device.h"
#include "worker/sequence.h"

namespace foretoken::worker {

enum class OnLate { kWait, kSkip };

class NvmeReads {
 public:
  explicit NvmeReads(OnLate on_late) : on_late_(on_late) {}

  // The step's token finds a segment that it may be written to; one that the last step has filled
  // goes to NVMe behind. REQUIRES: the sequence's length is not grown for the step yet; in all
  // others, where a step is named, it is.
  void turn_segment(Sequence& sequence);

  // Asks for the fetch lists of all layers, in their order, as far as there is room; then for what
  // later steps may want.
  void ask_ahead(Sequence& sequence);
  // Asks for all that the step reads of these. False: it must come a layer at a time.
  bool ask_step(std::span<Sequence* const> rows);
  // After ask_step(): has it there. It stays until the next ask_step().
  void bring_step(std::span<Sequence* const> rows);
  // What was asked for and is not waited for is read beside the step, and what later steps may
  // want. May be called while ops are in flight.
  void start(Sequence& sequence);

  // Before the layer's gather.
  void bring(Sequence& sequence, int layer);
  // Before attention that streams the layer.
  void bring_all(Sequence& sequence, int layer);
  // After either.
  void let_go(Sequence& sequence, int layer);

 private:
  // Runs of a layer's fetch list, each once.
  struct Wanted {
    std::vector<kvstore::HeadSegment> runs;
    std::vector<kvstore::HeadSegment> needed;  // of them, what is waited for
    std::vector<kvstore::HeadSegment> late;    // ... what is not there
    std::int64_t num_late = 0;                 // blocks in those
  };
  void look_up(const Sequence& sequence, int layer, Wanted& wanted);
  bool waits(const Sequence& sequence) const;
  bool ask_step(Sequence& sequence, std::vector<Wanted>& layers);
  static void ask_for_late(Sequence& sequence, const std::vector<Wanted>& layers);

  const OnLate on_late_;
  std::vector<int> num_blocks_;              // of a head's list, by segment
  Wanted wanted_;                            // of a layer
  std::vector<std::vector<Wanted>> by_row_;  // of the step's rows, by layer
};

// Waits for the event, and reads and writes runs of these sequences meanwhile; on a CPU it leaves
// the cores to what is waited for.
void work_until(kernels::Event& event, std::span<Sequence* const> rows,
                const kernels::Device& device);

}  // namespace foretoken::worker
