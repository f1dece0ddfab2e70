#include "worker/nvme_reads.h"

#include <algorithm>

namespace foretoken::worker {
namespace {

using kvstore::HeadSegment;

// The position of the token that the step under way stores: the sampler has counted the one that it
// draws.
int step_position(const Sequence& sequence) { return sequence.length() - 2; }

bool is_resident(int block, int position) {
  const int local_begin = std::max(0, position + 1 - kLocalTokens) / kBlockTokens;
  return block < kSinkTokens / kBlockTokens || block >= local_begin;
}

}  // namespace

// What make_room() says, status() keeps.
void NvmeReads::open_segment(Sequence& sequence) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  const int segment = (sequence.length() - 1) / kSegmentTokens;
  if (kv->is_here(0, {0, segment})) return;
  for (int layer = 0; layer < sequence.kv().shape.num_layers; ++layer) {
    if (!kv->make_room(layer, {segment, segment + 1})) return;
  }
}

void NvmeReads::close_segment(Sequence& sequence) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  const int stored = sequence.length() - 1;
  if (kv == nullptr || stored % kSegmentTokens != 0) return;
  const int segment = stored / kSegmentTokens - 1;
  for (int layer = 0; layer < sequence.kv().shape.num_layers; ++layer) {
    kv->fill(layer, {segment, segment + 1});
  }
}

NvmeReads::Wanted NvmeReads::wanted(const Sequence& sequence, int layer, kernels::Stream& stream) {
  const kernels::FetchList& fetches = sequence.fetches();
  const int heads = sequence.kv().shape.num_kv_heads;
  counts_.resize(static_cast<std::size_t>(heads));
  device_.copy_out(counts_.data(), fetches.counts + static_cast<std::ptrdiff_t>(layer) * heads,
                   counts_.size() * sizeof(std::int32_t), stream);
  stream.synchronize();
  Wanted wanted;
  for (int head = 0; head < heads; ++head) {
    entries_.resize(static_cast<std::size_t>(counts_[static_cast<std::size_t>(head)]));
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(layer) * heads + head;
    device_.copy_out(entries_.data(), fetches.entries + row * fetches.max_entries,
                     entries_.size() * sizeof(kernels::FetchEntry), stream);
    stream.synchronize();
    for (const auto& [block, slot] : entries_) {
      const HeadSegment run{head, block / kSegmentBlocks};
      const auto found = std::ranges::find(wanted.runs, run);
      const auto place = static_cast<std::size_t>(found - wanted.runs.begin());
      if (found == wanted.runs.end()) {
        wanted.runs.push_back(run);
        wanted.num_blocks.push_back(0);
      }
      ++wanted.num_blocks[place];
      if (is_resident(block, step_position(sequence))) wanted.resident.push_back(run);
    }
  }
  return wanted;
}

void NvmeReads::ask_ahead(Sequence& sequence, kernels::Stream& stream) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  for (int layer = 0; layer < sequence.kv().shape.num_layers; ++layer) {
    if (!kv->ask(layer, wanted(sequence, layer, stream).runs)) return;
  }
  kv->promote();
}

void NvmeReads::bring(Sequence& sequence, int layer, kernels::Stream& stream) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  const Wanted wanted = this->wanted(sequence, layer, stream);
  kv->advance();
  for (std::size_t i = 0; i < wanted.runs.size(); ++i) {
    if (!kv->is_here(layer, wanted.runs[i])) sequence.report.late += wanted.num_blocks[i];
  }
  const bool waits = on_late_ == OnLate::kWait || sequence.decode_steps == 0;
  kv->ask(layer, wanted.runs);
  static_cast<void>(kv->wait(layer, waits ? wanted.runs : wanted.resident));  // status() keeps it
}

void NvmeReads::bring_all(Sequence& sequence, int layer) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  const int segments = step_position(sequence) / kSegmentTokens + 1;
  static_cast<void>(kv->wait(layer, kvstore::Segments{0, segments}));
}

void NvmeReads::let_go(Sequence& sequence, int layer) {
  if (kvstore::OutsizedKv* kv = sequence.outsized()) kv->let_go(layer);
}

}  // namespace foretoken::worker
