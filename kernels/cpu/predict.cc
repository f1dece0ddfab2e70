// CpuDevice's predictor: the CNN over all maps, and the blocks it chooses.
#include <algorithm>
#include <atomic>
#include <span>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/best_blocks.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/history_rows.h"
#include "kernels/cpu/map_stream.h"

namespace foretoken::kernels {
namespace {

class CpuPredictor final : public Predictor {
 public:
  explicit CpuPredictor(const PredictorWeights& weights) : filters(weights) {}
  CnnFilters filters;
};

void predict_head(const CnnFilters& filters, const HistoryState& state, int layer, int kv_head,
                  const Selection& selection) {
  thread_local MapStream stream;
  thread_local HeadChoice choice;
  std::vector<std::vector<float>> map_scores;  // for segment_scores
  const int candidates = num_candidates(state.num_columns[layer]);
  choice.start(candidates);
  if (candidates <= state.top_k) {
    choice.add_latest(candidates);  // all: no score is needed
  } else {
    for (int m = 0; m < state.maps_per_kv_head; ++m) {
      const bool usable =
          stream.update(filters, state, layer, kv_head * state.maps_per_kv_head + m) &&
          choice.add_best(stream.scores(), state.top_k);
      if (usable && selection.segment_scores != nullptr) {
        map_scores.emplace_back(stream.scores().begin(), stream.scores().end());
      }
      if (usable) continue;
      choice.add_latest(state.top_k);
      std::atomic_ref(*state.fallbacks).fetch_add(1, std::memory_order_relaxed);
    }
  }
  choice.finish(layer, state.num_kv_heads, kv_head, state.max_per_head, selection);
  if (selection.segment_scores == nullptr) return;
  const auto segments = static_cast<std::size_t>(selection.max_segments);
  const std::span<float> scores(
      selection.segment_scores +
          static_cast<std::size_t>(layer * state.num_kv_heads + kv_head) * segments,
      segments);
  std::ranges::fill(scores, 0.0F);
  for (const std::vector<float>& map : map_scores) choice.note_segments(map, scores);
}

}  // namespace

std::unique_ptr<Predictor> CpuDevice::make_predictor(const PredictorWeights& weights) {
  return std::make_unique<CpuPredictor>(weights);
}

std::size_t CpuDevice::predictor_state_bytes(int max_columns) const {
  return map_stream_bytes(max_columns);
}

void CpuDevice::predict(const PredictArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    if (args.rows == 0) return;
    const CnnFilters& filters = static_cast<const CpuPredictor*>(args.predictor)->filters;
    const int heads = args.states[0].num_kv_heads;
    const int layers = args.states[0].num_layers;
    for (int row = 0; row < args.rows; ++row) {
      const HistoryState& state = args.states[row];
      FT_CHECK(state.num_kv_heads == heads && state.num_layers == layers, row);
      FT_CHECK(state.top_k >= 1 && state.max_per_head <= args.selections[row].max_selected, row);
    }
    pool_.parallel_for(args.rows * layers * heads, [&](int task, int) {
      const int row = task / (layers * heads);
      predict_head(filters, args.states[row], task / heads % layers, task % heads,
                   args.selections[row]);
    });
  });
}

}  // namespace foretoken::kernels
