#include "worker/nvme_reads.h"

#include <algorithm>
#include <chrono>
#include <functional>

#include "kernels/kept_blocks.h"

namespace foretoken::worker {
namespace {

using kvstore::HeadSegment;

// Late runs that a step asks for, where it does not wait: more than a disk reads beside a step
// (guessed: 64 MiB at the 8B shape, 13 GB/s).
constexpr int kMostLate = 512;

// Of the token that the step stores: the sampler has counted the one that it draws.
int step_position(const Sequence& sequence) { return sequence.length() - 2; }

bool is_resident(int block, int position) {
  return block < kernels::kSinkBlocks || block >= kernels::first_local_block(position);
}

}  // namespace

// What make_room() says, status() keeps.
void NvmeReads::turn_segment(Sequence& sequence) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  const int stored = sequence.length() - 1;
  const int layers = sequence.kv().shape.num_layers;
  const int segment = stored / kSegmentTokens;
  const bool step_filled_one = sequence.decode_steps > 0 && stored % kSegmentTokens == 0;
  for (int layer = 0; step_filled_one && layer < layers; ++layer) {
    kv->fill(layer, {segment - 1, segment});
  }
  if (kv->is_here(0, {0, segment})) return;
  for (int layer = 0; layer < layers; ++layer) {
    if (!kv->make_room(layer, {segment, segment + 1})) return;
  }
}

bool NvmeReads::waits(const Sequence& sequence) const {
  return on_late_ == OnLate::kWait || sequence.decode_steps == 0;
}

void NvmeReads::look_up(const Sequence& sequence, int layer, Wanted& wanted) {
  wanted.runs.clear();
  wanted.needed.clear();
  wanted.late.clear();
  wanted.num_late = 0;
  const kvstore::OutsizedKv& kv = *sequence.outsized();
  const int position = step_position(sequence);
  for (int head = 0; head < sequence.kv().shape.num_kv_heads; ++head) {
    const auto entries = sequence.host_fetches(layer, head);
    num_blocks_.assign(static_cast<std::size_t>(sequence.kv().max_segments), 0);
    const auto blocks_of = [this](HeadSegment run) -> int& {
      return num_blocks_[static_cast<std::size_t>(run.segment)];
    };
    const std::size_t first = wanted.runs.size();
    for (const auto& [block, slot] : entries) {
      const HeadSegment run{head, block / kSegmentBlocks};
      if (blocks_of(run)++ == 0) wanted.runs.push_back(run);
      if (is_resident(block, position)) wanted.needed.push_back(run);
    }
    for (const HeadSegment& run : std::span(wanted.runs).subspan(first)) {
      if (kv.is_here(layer, run)) continue;
      wanted.late.push_back(run);
      wanted.num_late += blocks_of(run);
    }
  }
  if (waits(sequence)) wanted.needed = wanted.runs;
}

void NvmeReads::ask_ahead(Sequence& sequence) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  bool asked = true;
  for (int layer = 0; asked && layer < sequence.kv().shape.num_layers; ++layer) {
    look_up(sequence, layer, wanted_);
    asked = kv->ask(layer, wanted_.runs);
  }
  kv->drop_unheld();
  kv->advance();
  if (asked) kv->promote();
}

bool NvmeReads::ask_step(std::span<Sequence* const> rows) {
  by_row_.resize(rows.size());
  bool all = true;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i]->outsized() != nullptr && !ask_step(*rows[i], by_row_[i])) all = false;
  }
  return all;
}

// What is there must stay while the step reads it. What comes later is not shown to the step, as it
// would not be held: so where a sequence that does not wait needs what is not there, there is no
// room.
bool NvmeReads::ask_step(Sequence& sequence, std::vector<Wanted>& layers) {
  kvstore::OutsizedKv& kv = *sequence.outsized();
  const int num_layers = sequence.kv().shape.num_layers;
  layers.resize(static_cast<std::size_t>(num_layers));
  kv.show_arrived();
  for (int layer = 0; layer < num_layers; ++layer) kv.let_go(layer);
  bool all = true;
  for (int layer = 0; all && layer < num_layers; ++layer) {
    Wanted& wanted = layers[static_cast<std::size_t>(layer)];
    look_up(sequence, layer, wanted);
    const auto is_here = [&](HeadSegment run) { return kv.is_here(layer, run); };
    if (!waits(sequence)) std::erase_if(wanted.runs, std::not_fn(is_here));
    all = kv.ask(layer, wanted.runs) && kv.ask(layer, wanted.needed) &&
          (waits(sequence) || std::ranges::all_of(wanted.needed, is_here));
  }
  if (all && !waits(sequence)) ask_for_late(sequence, layers);
  kv.drop_unheld();
  return all;
}

// Each layer's share, from another place of its list on each time: where the disk is too slow for
// all, all have their turn.
void NvmeReads::ask_for_late(Sequence& sequence, const std::vector<Wanted>& layers) {
  const auto share = static_cast<std::size_t>(kMostLate) / layers.size() + 1;
  const auto step = static_cast<std::size_t>(sequence.decode_steps);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const std::vector<HeadSegment>& late = layers[layer].late;
    std::vector<HeadSegment> turn;
    for (std::size_t i = 0; i < std::min(share, late.size()); ++i) {
      turn.push_back(late[(step * share + i) % late.size()]);
    }
    if (!sequence.outsized()->ask(static_cast<int>(layer), turn)) return;
  }
}

// A lost sequence goes on with what there is; status() says so.
void NvmeReads::bring_step(std::span<Sequence* const> rows) {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    kvstore::OutsizedKv* kv = rows[i]->outsized();
    if (kv == nullptr) continue;
    for (int layer = 0; layer < rows[i]->kv().shape.num_layers; ++layer) {
      const Wanted& wanted = by_row_[i][static_cast<std::size_t>(layer)];
      rows[i]->report.late += wanted.num_late;
      if (waits(*rows[i])) static_cast<void>(kv->wait(layer, wanted.needed));
    }
  }
}

void NvmeReads::start(Sequence& sequence) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  kv->advance(0);
  kv->promote();
}

void NvmeReads::bring(Sequence& sequence, int layer) {
  kvstore::OutsizedKv* kv = sequence.outsized();
  if (kv == nullptr) return;
  kv->advance();
  kv->show_arrived();
  look_up(sequence, layer, wanted_);
  sequence.report.late += wanted_.num_late;
  kv->ask(layer, wanted_.runs);
  static_cast<void>(kv->wait(layer, wanted_.needed));  // status() keeps it
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

void work_until(kernels::Event& event, std::span<Sequence* const> rows,
                const kernels::Device& device) {
  constexpr std::chrono::seconds kPatience{10};  // then the event's own deadline counts
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!device.runs_at_once() && !event.done() && std::chrono::steady_clock::now() < end) {
    for (Sequence* row : rows) {
      if (row->outsized() != nullptr) row->outsized()->advance(1);
    }
  }
  event.synchronize();
}

}  // namespace foretoken::worker
