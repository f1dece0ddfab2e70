// The ops of kernels/device.h as functions that enqueue on a CUDA stream: each lies in the file
// that its comment names. `activation` is the device's activation type (bf16 or fp16).
#pragma once

#include "kernels/cuda/cuda_stream.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

// elementwise.cu
void embed(const EmbedArgs& args, DataType activation, CudaStream& stream);
void rms_norm(const RmsNormArgs& args, DataType activation, CudaStream& stream);
void swiglu(const SwiGluArgs& args, DataType activation, CudaStream& stream);

// rope.cu
void rope_prefill(const RopePrefillArgs& args, DataType activation, CudaStream& stream);
void rope_decode(const RopeDecodeArgs& args, DataType activation, CudaStream& stream);

// decode_attention.cu
void decode_attention(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream);
// streamed_attention.cu
void streamed_attention(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream);
void sketched_attention(const DecodeAttentionArgs& args, DataType activation, CudaStream& stream);

// begin_prefill_attention.cu. What a padded plan finds on the device: lengths = {rows, begin +
// rows}, and V finite as far as it is read.
void begin_prefill_attention(const PrefillAttentionArgs& args, std::int32_t* lengths,
                             CudaStream& stream);

// prefill_block_max.cu
void prefill_block_max(const PrefillBlockMaxArgs& args, DataType activation, CudaStream& stream);

// kv_blocks.cu. CTAs of a gather: they fill the host link at 8 KiB a block, and leave the SMs to
// compute.
inline constexpr int kCopyCtas = 16;
void pack_blocks(const PackBlocksArgs& args, CudaStream& stream);
void unpack_blocks(const UnpackBlocksArgs& args, CudaStream& stream);
void write_through(const WriteThroughArgs& args, CudaStream& stream);
void gather(const GatherArgs& args, CudaStream& stream);

// key_sketch.cu
void sketch_blocks(const SketchBlocksArgs& args, DataType activation, CudaStream& stream);
void sketch_filled(const SketchFilledArgs& args, DataType activation, CudaStream& stream);

// slot_table.cu
void advance(const AdvanceArgs& args, CudaStream& stream);
void resolve(const ResolveArgs& args, CudaStream& stream);

// history.cu
void history_append(const HistoryAppendArgs& args, CudaStream& stream);

// predict.cu
std::unique_ptr<Predictor> make_predictor(const PredictorWeights& weights);
float bias_of(const Predictor& predictor);  // what predict() leaves out of all scores
std::size_t predictor_state_bytes(int max_columns);
void predict(const PredictArgs& args, CudaStream& stream);

// segment_scores.cu. After predict(): what some selection's segment_scores want.
void score_segments(const PredictArgs& args, CudaStream& stream);

// select.cu
void select_top(const SelectTopArgs& args, CudaStream& stream);
void select_recent(const SelectRecentArgs& args, CudaStream& stream);
void select_trace(const SelectTraceArgs& args, CudaStream& stream);

// sample.cu
void sample(const SampleArgs& args, CudaStream& stream);

}  // namespace foretoken::kernels::cuda
