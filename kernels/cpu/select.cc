// CpuDevice's choices without the CNN: the oracle's and the sliding window's.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/best_blocks.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/trace_choice.h"

namespace foretoken::kernels {
namespace {

// values[c] = mean over heads of exp(block_max - lse) of candidate column c.
void exact_values(const SelectTopArgs& args, int row, int first_head, int num_heads,
                  std::vector<float>& values) {
  std::fill(values.begin(), values.end(), 0.0F);
  const float share = 1.0F / static_cast<float>(num_heads);
  for (int h = first_head; h < first_head + num_heads; ++h) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * args.num_heads + h;
    const float* maxima = args.block_max + at * args.pitch + kSinkBlocks;
    for (std::size_t c = 0; c < values.size(); ++c) {
      values[c] += share * std::exp(maxima[c] - args.lse[at]);
    }
  }
}

void select_top_of_head(const SelectTopArgs& args, int row, int kv_head) {
  thread_local HeadChoice choice;
  thread_local std::vector<float> values;
  const SequenceKv& kv = args.sequences[row];
  const int num_candidates = std::max(0, first_local_block(*kv.length) - kSinkBlocks);
  const int heads_per_map = args.num_heads / (kv.shape.num_kv_heads * args.maps_per_kv_head);
  choice.start(num_candidates);
  values.resize(static_cast<std::size_t>(num_candidates));
  for (int m = 0; m < args.maps_per_kv_head; ++m) {
    const int map = kv_head * args.maps_per_kv_head + m;
    exact_values(args, row, map * heads_per_map, heads_per_map, values);
    if (!choice.add_best(values, args.top_k)) choice.add_latest(args.top_k);
  }
  const Selection& selection = args.selections[row];
  choice.finish(args.layer, kv.shape.num_kv_heads, kv_head, selection.max_selected, selection);
}

void select_recent_of_sequence(const SequenceKv& kv, int count, const Selection& selection) {
  const int end = first_local_block(*kv.length);
  const int first = std::max(kSinkBlocks, end - count);
  for (int head = 0; head < kv.shape.num_layers * kv.shape.num_kv_heads; ++head) {
    std::int32_t* blocks = selection.blocks + std::ptrdiff_t{head} * selection.max_selected;
    for (int block = first; block < end; ++block) blocks[block - first] = block;
    selection.counts[head] = std::max(0, end - first);
  }
}

void select_trace_of_sequence(const SequenceKv& kv, const TraceChoice& choice,
                              const Selection& selection) {
  for (int head = 0; head < kv.shape.num_layers * kv.shape.num_kv_heads; ++head) {
    std::int32_t* blocks = selection.blocks + std::ptrdiff_t{head} * selection.max_selected;
    for (int i = 0; i < choice.count; ++i) blocks[i] = choice.block(head, i);
    selection.counts[head] = choice.count;
  }
}

}  // namespace

void CpuDevice::select_top(const SelectTopArgs& args, Stream& stream) {
  FT_CHECK(args.top_k >= 1 && args.maps_per_kv_head >= 1, args.top_k, args.maps_per_kv_head);
  enqueue(stream, [this, args] {
    if (args.rows == 0) return;
    const int heads = args.sequences[0].shape.num_kv_heads;
    FT_CHECK(args.num_heads % (heads * args.maps_per_kv_head) == 0, args.num_heads, heads);
    pool_.parallel_for(args.rows * heads, [&](int task, int) {
      select_top_of_head(args, task / heads, task % heads);
    });
  });
}

void CpuDevice::select_recent(const SelectRecentArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int row = 0; row < args.rows; ++row) {
      const Selection& selection = args.selections[row];
      FT_CHECK(args.count >= 0 && args.count <= selection.max_selected, args.count);
      select_recent_of_sequence(args.sequences[row], args.count, selection);
    }
  });
}

void CpuDevice::select_trace(const SelectTraceArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int row = 0; row < args.rows; ++row) {
      const Selection& selection = args.selections[row];
      FT_CHECK(args.count >= 0 && args.count <= selection.max_selected, args.count);
      select_trace_of_sequence(args.sequences[row],
                               trace_choice(*args.sequences[row].length, args.count, args.churn),
                               selection);
    }
  });
}

}  // namespace foretoken::kernels
