#include "predictor/internal/policies.h"

namespace foretoken::predictor {

std::size_t BasePolicy::block_max_bytes(int num_slots) const {
  if (!observes()) return 0;
  const int rows = setup().shape.kv.num_layers * setup().shape.num_heads;
  return sizeof(float) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(num_slots);
}

void StreamingLlmPolicy::select_ahead(const DecodeBatch& batch, kernels::Stream& stream) {
  kernels::SelectRecentArgs args{};
  args.sequences = batch.sequences;
  args.selections = batch.selections;
  args.rows = batch.rows;
  args.count = setup().maps.max_per_head;
  device().select_recent(args, stream);
}

void OraclePolicy::select_at_query(const DecodeBatch& batch, int layer, const AttentionRows& exact,
                                   kernels::Stream& stream) {
  FT_CHECK(exact.block_max != nullptr && exact.rows == 1, exact.rows);
  kernels::SelectTopArgs args{};
  args.block_max = exact.block_max;
  args.lse = exact.lse;
  args.pitch = exact.pitch;
  args.num_heads = setup().shape.num_heads;
  args.sequences = batch.sequences;
  args.selections = batch.selections;
  args.rows = batch.rows;
  args.layer = layer;
  args.maps_per_kv_head = setup().maps.per_kv_head;
  args.top_k = setup().maps.top_k;
  device().select_top(args, stream);
}

kernels::HistoryAppendArgs AttentionPredictorPolicy::append_args(int layer,
                                                                 const AttentionRows& rows) const {
  kernels::HistoryAppendArgs args{};
  args.layer = layer;
  args.block_max = rows.block_max;
  args.lse = rows.lse;
  args.num_layers = rows.num_layers;
  args.rows = rows.rows;
  args.pitch = rows.pitch;
  args.num_heads = setup().shape.num_heads;
  args.num_columns = rows.num_columns;
  args.hold = config().history_fill == HistoryFill::kHold;
  return args;
}

void AttentionPredictorPolicy::observe_prefill(const kernels::HistoryState* state, int layer,
                                               const AttentionRows& rows, kernels::Stream& stream) {
  FT_CHECK(rows.block_max != nullptr);
  kernels::HistoryAppendArgs args = append_args(layer, rows);
  args.states = state;
  args.num_sequences = 1;
  device().history_append(args, stream);
}

void AttentionPredictorPolicy::observe_decode(const DecodeBatch& batch, int layer,
                                              const AttentionRows& rows, kernels::Stream& stream) {
  kernels::HistoryAppendArgs args = append_args(layer, rows);
  args.states = batch.histories;
  args.num_sequences = batch.rows;
  args.sequences = batch.sequences;
  device().history_append(args, stream);
}

void AttentionPredictorPolicy::select_ahead(const DecodeBatch& batch, kernels::Stream& stream) {
  kernels::PredictArgs args{};
  args.predictor = predictor_.get();
  args.states = batch.histories;
  args.selections = batch.selections;
  args.rows = batch.rows;
  args.scores_segments = batch.scores_segments;
  device().predict(args, stream);
  if (!config().trace_churn) return;
  device().select_trace({.sequences = batch.sequences,
                         .selections = batch.selections,
                         .rows = batch.rows,
                         .count = setup().maps.max_per_head,
                         .churn = *config().trace_churn},
                        stream);
}

}  // namespace foretoken::predictor
