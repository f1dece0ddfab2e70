// Device: everything that Foretoken asks of a processor with its own memory. One interface, two
// implementations: kernels/cpu (the reference and the embedded default) and kernels/cuda.
// The model graph (worker/model.h), the store's gather and the predictor are written once, here.
//
// Conventions
//   - Every op takes an args struct and a Stream, enqueues, and returns. All pointers must stay
//     valid until the stream has passed the op. Shapes are [rows, columns], last index fastest.
//   - Pointers are device pointers, unless a comment says "host". On the CPU device they are plain
//     memory that is accounted separately, so that tiering stays real and visible there.
//   - Activations have activation_type(); accumulation is fp32 everywhere; logits are fp32.
//   - Values that change from step to step (lengths, tables, lists) lie in device memory, so that
//     one recorded sequence of ops serves every step.
//   - A broken REQUIRES ends the process (FT_CHECK). A device failure throws Exception(kDevice).
//   - An op may be called by one thread at a time per stream; several streams at once are fine.
//
// Example: tests/kernels/device_test.cc
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "common/ids.h"
#include "kernels/kv_layout.h"

namespace foretoken::kernels {

class PeerSum;  // kernels/peer_sum.h

std::string_view name_of(DataType type);

// How a history value is stored. kE5m3: the fp16 bits of value * 2^12, shifted right by 7
// (5 exponent and 3 mantissa bits, no sign): 2^-29 .. 15 in one byte.
enum class HistoryType { kFp32, kBf16, kE5m3 };
constexpr std::size_t bytes_of(HistoryType type) {
  return type == HistoryType::kFp32 ? 4 : type == HistoryType::kBf16 ? 2 : 1;
}

// What an allocation is for; the device's memory table (Device::memory_in_use) counts by it.
enum class MemoryUse {
  kWeights,
  kKvSlots,
  kTables,
  kHistory,
  kSketches,
  kActivations,
  kPrefill,
  kSums,
  kCount
};
std::string_view name_of(MemoryUse use);

class Device;

// Owns device memory; move-only. Contents start undefined.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device& device, std::size_t bytes, MemoryUse use);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  std::size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  MemoryUse use_ = MemoryUse::kActivations;
};

// A queue of work, run in order. kCompute may use the whole device; kCopy is for gathers and
// write-through beside it (few CTAs on a GPU; one thread of low priority on the CPU).
enum class StreamKind { kCompute, kCopy };
class Stream {
 public:
  virtual ~Stream() = default;
  // Blocks the host until all that was enqueued has run. Rethrows what an op threw. On a GPU these
  // waits, and an event's, have a deadline of 100 s, and throw Exception(kDevice) past it.
  virtual void synchronize() = 0;
  // What other libraries of the device know it by (cudaStream_t); null on the CPU.
  virtual void* native_handle() const { return nullptr; }
};

// A point in a stream. record() may be called again: the event then stands for the later point.
class Event {
 public:
  virtual ~Event() = default;
  virtual void record(Stream& stream) = 0;
  // Later work of `stream` starts after the recorded point. No-op if never recorded.
  virtual void wait(Stream& stream) = 0;
  virtual bool done() const = 0;   // true if never recorded
  virtual void synchronize() = 0;  // blocks the host
};

// Recorded work: launch() enqueues all of it again, at the cost of one op.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual void launch(Stream& stream) = 0;
};

// A matrix of weights in whatever form the device multiplies best. Made by make_weight.
class Weight {
 public:
  virtual ~Weight() = default;
  int rows = 0;     // output features
  int columns = 0;  // input features
};

// Rows in host memory of any kind.
struct HostRows {
  const std::byte* data = nullptr;
  std::size_t count = 0;
  std::size_t row_bytes = 0;
  std::size_t stride_bytes = 0;
};

// Rows of a host matrix [rows, columns], row stride in bytes; parts are stacked in order.
struct WeightPart {
  const std::byte* data = nullptr;  // host
  DataType type = DataType::kFp16;
  int rows = 0;
  int columns = 0;
  std::size_t row_stride_bytes = 0;
};

// ---- transformer ops -------------------------------------------------------------------------

// Tokens that aren't in this rank's part of the table give zero rows.
struct EmbedArgs {
  const TokenId* tokens;        // [num_tokens]; or null:
  const SequenceKv* sequences;  // [num_tokens]: the token at position *length of each
  const void* table;            // [table_tokens, hidden] of table_type
  DataType table_type;
  TokenId first_token;  // of the table
  int table_tokens;
  int num_tokens;
  int hidden;
  void* out;  // [num_tokens, hidden] activation
};

// out = x / sqrt(mean(x^2) + eps) * weight.
struct RmsNormArgs {
  const void* x;        // [rows, columns] activation
  const float* weight;  // [columns]
  float eps;
  int rows;
  int columns;
  void* out;  // [rows, columns] activation; may be x
};

// What a product may take its input through, and give its output to, without a pass over memory
// of its own where the device can do so. Where it can't, `scratch` holds what lies between.
struct NormedInput {
  const float* weight = nullptr;  // [weight.columns] of an RMS norm; null: x as it is
  float eps = 0;
  void* scratch = nullptr;  // [rows, weight.columns] activation
};
struct SwiGluOutput {
  void* scratch = nullptr;  // [rows, weight.rows] activation; null: the product as it is
};

// out = norm(x) W^T + bias (+ residual), or silu(gate) * up of that product = [rows, gate | up].
struct LinearArgs {
  const void* x;  // [rows, weight.columns] activation
  const Weight* weight;
  const float* bias;  // [weight.rows], or null
  int rows;
  void* out;  // [rows, weight.rows] activation; fp32 if out_fp32; half as wide with swiglu
  bool out_fp32 = false;
  NormedInput norm = {};
  const void* residual = nullptr;  // [rows, weight.rows] activation; may be out; not with swiglu
  SwiGluOutput swiglu = {};
};

// Products one after the other: linear() of each, and after those that `summed` names (bit i: of
// product i) the sum of its out over the ranks. The next one takes that as its x.
struct LinearChainArgs {
  std::span<const LinearArgs> products;
  std::uint32_t summed = 0;
  PeerSum* sum = nullptr;  // where something is summed
};

// out = silu(gate) * up, for gate_up = [rows, gate | up], each `columns` wide.
struct SwiGluArgs {
  const void* gate_up;
  int rows;
  int columns;
  void* out;  // [rows, columns] activation
};

// Splits qkv = [rows, q | k | v], norms q and k a head where weights are given (Qwen3), rotates
// both by position (rotate-half, as Hugging Face), and stores q, k, v.
// inv_freq: [head_dim / 2], already scaled (common/model_config.h); scale: yarn's attention factor.
struct RopeArgs {
  const void* qkv;      // [rows, (num_heads + 2 * num_kv_heads) * head_dim] activation
  const float* q_norm;  // [head_dim], or null
  const float* k_norm;
  float norm_eps;
  const float* inv_freq;
  float scale;
  int rows;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  void* q_out;  // [rows, num_heads, head_dim] activation
};

// Prefill: rows are tokens [begin, begin + rows) of one sequence; k, v go to the layer's scratch.
struct RopePrefillArgs : RopeArgs {
  DataType kv_type;
  int begin;
  void* k_out;  // [num_kv_heads, scratch_tokens, head_dim] KV type; row begin + i
  void* v_out;
  int scratch_tokens;
};

// Decode: row i is the next token of sequences[i], at position *sequences[i].length; k, v go to
// the open block's slot of `layer` (resident by the resolver's rule). The length is not changed.
struct RopeDecodeArgs : RopeArgs {
  const SequenceKv* sequences;  // [rows]
  int layer;
};

// Causal attention of tokens [begin, begin + rows) over keys [0, begin + rows) of the scratch.
// q, out and lse have room for max_rows rows. What lies behind `rows` of out and lse, and behind
// begin + rows of v, may be overwritten.
struct PrefillAttentionArgs {
  const void* q;  // [max_rows, num_heads, head_dim] activation
  const void* k;  // [num_kv_heads, scratch_tokens, head_dim] KV type
  void* v;
  DataType kv_type;
  int scratch_tokens;
  int begin;
  int rows;
  int max_rows;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  float scale;
  void* out;   // [max_rows, num_heads, head_dim] activation
  float* lse;  // [num_heads, max_rows] natural log of the sum of exponentials, or null
};

// Block maxima of the logits (scaled scores) of the last queries: what history rows are made of.
//   block_max[h, r, c] = max over tokens t of block c, t <= begin + r, of scale * q[r, h] . k[t]
// -inf where a block lies behind the query.
struct PrefillBlockMaxArgs {
  const void* q;  // [rows, num_heads, head_dim] activation
  const void* k;
  DataType kv_type;
  int scratch_tokens;
  int begin;
  int rows;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  float scale;
  float* block_max;  // [num_heads, rows, pitch]
  int pitch;
};

// Attention of one query a sequence over its resident blocks: every slot that holds a block, the
// open block included (length + 1 tokens are visible). One pass gives output, LSE and block maxima:
// the logits' maxima, -inf for an empty slot, which are noted in SequenceKv::block_max.
struct DecodeAttentionArgs {
  const void* q;                // [rows, num_heads, head_dim] activation
  const SequenceKv* sequences;  // [rows]
  int rows;
  int layer;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  float scale;
  void* out;   // [rows, num_heads, head_dim] activation
  float* lse;  // [rows, num_heads]
  // Of ops over all blocks alone, which have no slot for each: [rows, num_heads, pitch] by block,
  // -inf past the last one; null: not wanted.
  float* block_max = nullptr;
  int pitch = 0;  // >= every row's blocks
};

// ---- the KV cache ----------------------------------------------------------------------------

// Copies blocks [first_block, first_block + num_blocks) of a layer from the prefill scratch to the
// arena (with checksums), and into slots where the block is resident. The last block may be part.
struct PackBlocksArgs {
  const void* k;  // [num_kv_heads, scratch_tokens, head_dim] KV type
  const void* v;
  int scratch_tokens;
  int num_kv_heads;
  int head_dim;
  int layer;
  int first_block;
  int num_blocks;
  int num_tokens;  // of the scratch, in all: rows past it are not read
  bool to_arena;   // false where another rank writes this head
  const SequenceKv* sequence;
  // The sequence's slabs as the host knows them: then copy engines may write the arena, and the
  // compute units stay free. Null: they aren't known here. Host; not read after the call.
  std::byte* const* host_slabs = nullptr;  // [num_kv_heads, max_segments]
  int max_segments = 0;
  std::byte* const* host_runs = nullptr;  // the same of an outsized sequence: its runs of the layer
};

// The reverse, for a reused prefix: arena -> scratch, verified. A mismatch: zeros, and
// *sequence->mismatches counts it.
struct UnpackBlocksArgs {
  void* k;
  void* v;
  int scratch_tokens;
  int num_kv_heads;
  int head_dim;
  int layer;
  int first_block;
  int num_blocks;
  const SequenceKv* sequence;
};

// Write-through of the block that the step just filled (length % 16 == 0, length counting the
// step's token): slot -> arena, all layers and heads, with checksums. No-op for other rows.
struct WriteThroughArgs {
  const SequenceKv* sequences;  // [rows]
  int rows;
  bool to_slabs;  // false where another rank writes this head; an outsized row has runs of its own,
                  // which are written all the same
};

// Sketches (kernels/key_sketch.h) of the complete blocks [0, num_blocks) of a layer, from the keys
// in the prefill scratch. REQUIRES: the sequence keeps sketches, as in the next.
struct SketchBlocksArgs {
  const void* k;  // [num_kv_heads, scratch_tokens, head_dim] KV type
  int scratch_tokens;
  int num_kv_heads;
  int layer;
  int num_blocks;
  const SequenceKv* sequence;
};

// The sketch of the block that the step just filled (as in WriteThroughArgs) from its slot, all
// layers and heads. No-op for other rows.
struct SketchFilledArgs {
  const SequenceKv* sequences;  // [rows]
  int rows;
};

// ++*length of every sequence: the step's token is stored in all layers.
struct AdvanceArgs {
  const SequenceKv* sequences;  // [rows]
  int rows;
};

// Selection against the slot table, one (layer, head) after the other, all in one launch:
// needed = sink + local (of the coming step, whose token is at position *length) + selected.
// Needed and absent blocks get a free slot, or the slot of a resident block that is not needed,
// the one least wanted first (the lowest block
// index first). Tables are updated here; the bytes follow with gather.
// A block that no byte has been written of (the open block at its birth) gets a slot, no fetch.
struct ResolveArgs {
  const SequenceKv* sequences;  // [rows]
  const Selection* selections;  // [rows]
  FetchList* fetches;           // [rows]
  int rows;
  int first_layer;  // layers [first_layer, first_layer + num_layers)
  int num_layers;
};

// Brings some layers' fetch lists from the arena into the slots; verifies each block's checksum.
// A mismatch: the block is made absent (tables say so), and *sequence.mismatches counts it. The
// open block, which the step writes to, stays, as zeros. Absent too is a block of an outsized
// sequence whose run is on NVMe (late), which is not counted: the host has the run table.
struct GatherArgs {
  const SequenceKv* sequences;  // [rows]
  const FetchList* fetches;     // [rows]
  int rows;
  int layer;  // the first of num_layers
  int num_layers = 1;
};

// ---- prediction ------------------------------------------------------------------------------

// Attention rows of some layers into the histories. Row value of a map and block:
//   mean over the map's query heads of exp(block_max - lse)
// Blocks without a value (not attended): 0, or their last value where the history holds.
struct HistoryAppendArgs {
  const HistoryState* states;  // [num_sequences]
  int num_sequences;
  int layer;  // the first of num_layers
  // Logits by block: [num_layers, num_sequences, num_heads, rows, pitch]. Null: by slot, the one
  // row that decode_attention has noted in each sequence.
  const float* block_max;
  const float* lse;  // [num_layers, num_sequences, num_heads, rows]
  int rows;          // 1 in a decode step, up to 64 after prefill (oldest first)
  int pitch;
  const SequenceKv* sequences;  // [num_sequences]; not read where block_max is by block
  int num_heads;
  const std::int32_t* num_columns;  // [num_sequences] ceil(tokens attended / 16)
  bool hold;
  int num_layers = 1;
};

// The CNN, one model for all layers and heads (docs/predictor.md). float32.
struct PredictorWeights {
  std::array<float, 16 * 9> conv1_weight;
  std::array<float, 16> conv1_bias;
  std::array<float, 32 * 16 * 9> conv2_weight;
  std::array<float, 32> conv2_bias;
  std::array<float, 32> conv3_weight;
  float conv3_bias;
};

// The network in the form the device evaluates it (folded biases, affine regime, fragments).
class Predictor {
 public:
  virtual ~Predictor() = default;
};

// Scores of the candidates of every map from its history, then the k best a map, sorted by block:
// the next step's selection. Advances the streaming state; call once a step after the row.
struct PredictArgs {
  const Predictor* predictor;
  HistoryState* states;   // [rows]
  Selection* selections;  // [rows]
  int rows;
  bool scores_segments = false;  // some selection wants segment_scores
};

// The k best candidate columns a map by the exact rows of this step (the oracle's choice).
struct SelectTopArgs {
  const float* block_max;  // [rows, num_heads, pitch] logits by block
  const float* lse;        // [rows, num_heads]
  int pitch;
  int num_heads;
  const SequenceKv* sequences;  // [rows]; the step's token is at position *length
  Selection* selections;        // [rows]
  int rows;
  int layer;
  int maps_per_kv_head;
  int top_k;
};

// The `count` blocks before the local window, all layers and heads (a sliding window's choice).
struct SelectRecentArgs {
  const SequenceKv* sequences;  // [rows]; for the coming token, at position *length
  Selection* selections;        // [rows]
  int rows;
  int count;
};

// A benchmark's choice, which needs no attention: `count` blocks a head, of which the given share
// is new from each step to the next (kernels/trace_choice.h). For the coming token, at *length.
struct SelectTraceArgs {
  const SequenceKv* sequences;  // [rows]
  Selection* selections;        // [rows]
  int rows;
  int count;
  float churn;  // 0 .. 1
};

// ---- sampling --------------------------------------------------------------------------------

struct SampledToken;

struct SampleRow {
  float temperature = 0;         // 0: greedy
  std::int32_t top_k = 0;        // 0: off
  float top_p = 1;               // 1: off
  float min_p = 0;               // 0: off
  float repetition_penalty = 1;  // 1: off
  float presence_penalty = 0;    // 0: off
  float frequency_penalty = 0;   // 0: off
  std::uint64_t seed = 0;
  std::int64_t position = 0;  // of the token that is sampled
  TokenId* tokens = nullptr;  // [num_tokens, and one more where `append`] prompt then output
  std::int32_t num_prompt = 0;
  std::int32_t num_tokens = 0;
  bool append = false;  // the drawn token goes to tokens[num_tokens], where the next step reads it
  std::int32_t num_logprobs = 0;  // of the best tokens, <= kMaxLogprobs
  TokenId forced = -1;            // taken instead of sampling (its logprob is reported); < 0: none
  const std::uint32_t* mismatches = nullptr;  // SequenceKv's, or null
  SampledToken* out = nullptr;                // on the device, or pinned in host memory
};
inline constexpr int kMaxLogprobs = 20;

struct SampledToken {
  TokenId token;
  float logprob;             // of the raw logits' softmax, before temperature and penalties
  std::uint32_t mismatches;  // as they stand: with any, the token is drawn from wrong KV
  std::int32_t num_top;
  TokenId top_ids[kMaxLogprobs];
  float top_logprobs[kMaxLogprobs];
};

// A pure function of (logits, row): Philox4x32-10 keyed by seed, counter = position.
struct SampleArgs {
  const float* logits;    // [rows, vocab]
  const SampleRow* rows;  // [num_rows]
  int num_rows;
  int vocab;
  std::uint32_t* token_counts = nullptr;  // [num_rows, vocab], scratch; a CPU needs none
};

// ---- the interface ---------------------------------------------------------------------------

struct DeviceInfo {
  std::string name;          // "AMD EPYC, 2 threads" or "NVIDIA H200"
  std::size_t memory_bytes;  // what may be allocated, in all
  int compute_units;         // threads or SMs
  int gather_units;          // threads or thread blocks that a gather takes
  bool shares_host_memory;   // its memory is the host's: KV crosses no link
};

class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceInfo info() const = 0;
  virtual DataType activation_type() const = 0;
  // True where an op of a compute stream has run when its call returns.
  virtual bool runs_at_once() const = 0;

  // Called now and then by a wait for this device that takes long; what it throws ends the wait.
  // For what makes a wait endless without the device's knowing, as a peer's death. Not while one
  // waits.
  virtual void set_wait_check(std::function<void()> check) = 0;

  // Memory. allocate() throws Exception(kExhausted) naming use, wanted and free bytes.
  virtual void* allocate(std::size_t bytes, MemoryUse use) = 0;
  virtual void release(void* data, std::size_t bytes, MemoryUse use) = 0;
  virtual std::size_t memory_in_use(MemoryUse use) const = 0;
  virtual std::unique_ptr<Stream> make_stream(StreamKind kind) = 0;
  virtual std::unique_ptr<Event> make_event() = 0;
  // Records what `ops` enqueues on `stream`, and on streams that are forked off it by an event and
  // joined again before the end. Nothing runs now. REQUIRES: the same ops have run once on these
  // streams; what `ops` refers to outlives the graph (a device may call it at each launch).
  virtual std::unique_ptr<Graph> record(Stream& stream, const std::function<void()>& ops) = 0;
  virtual void copy_in(void* device, const void* host, std::size_t bytes, Stream& stream) = 0;
  // copy_in of few bytes, of which a step can't begin before it has them, in whole words of 8, from
  // memory of allocate_pinned().
  virtual void read_in(void* device, const void* pinned, std::size_t bytes, Stream& stream) {
    copy_in(device, pinned, bytes, stream);
  }
  virtual void copy_out(void* host, const void* device, std::size_t bytes, Stream& stream) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, Stream& stream) = 0;
  virtual void fill_zero(void* device, std::size_t bytes, Stream& stream) = 0;

  // Brings rows to the device, one behind the other, as fast as several threads and the link can:
  // for weights. The host's memory stays as it is, and the device's is used, until
  // finish_uploads(); from then on the rows are there, for ops and copies of any stream. For one
  // caller at a time.
  virtual void upload(void* device, const HostRows& rows) = 0;
  virtual void finish_uploads() = 0;

  // Host memory that copies reach without a detour, so that they run beside the host.
  virtual void* allocate_pinned(std::size_t bytes) = 0;
  virtual void release_pinned(void* host) = 0;

  // Makes host memory (the arena's stripe) readable and writable by ops; returns its device
  // address. The memory must stay mapped until unregister_host.
  virtual std::byte* register_host(std::byte* host, std::size_t bytes) = 0;
  virtual void unregister_host(std::byte* host) = 0;

  // Stacks the parts ([sum of rows, columns]) and prepares them: uploads, for finish_uploads() to
  // end. All parts share columns. For one caller at a time: it uses several threads itself.
  virtual std::unique_ptr<Weight> make_weight(std::span<const WeightPart> parts) = 0;
  virtual std::unique_ptr<Predictor> make_predictor(const PredictorWeights& weights) = 0;
  // Bytes of one map's streaming state beside its ring of rows, for max_columns.
  virtual std::size_t predictor_state_bytes(int max_columns) const = 0;

  virtual void embed(const EmbedArgs& args, Stream& stream) = 0;
  virtual void rms_norm(const RmsNormArgs& args, Stream& stream) = 0;
  virtual void linear(const LinearArgs& args, Stream& stream) = 0;
  // Without ops of the sums' own, where the device can. REQUIRES: chains(args).
  virtual bool chains(const LinearChainArgs& /*args*/) const { return false; }
  virtual void linear_chain(const LinearChainArgs& args, Stream& stream);
  virtual void swiglu(const SwiGluArgs& args, Stream& stream) = 0;
  virtual void rope_prefill(const RopePrefillArgs& args, Stream& stream) = 0;
  virtual void rope_decode(const RopeDecodeArgs& args, Stream& stream) = 0;
  virtual void prefill_attention(const PrefillAttentionArgs& args, Stream& stream) = 0;
  virtual void prefill_block_max(const PrefillBlockMaxArgs& args, Stream& stream) = 0;
  virtual void decode_attention(const DecodeAttentionArgs& args, Stream& stream) = 0;
  // decode_attention over all blocks of the sequence: resident ones from their slots, the others
  // straight from the arena (pinned host memory), without slots. Block maxima go to
  // args.block_max. args.out may be null: LSE and block maxima alone are wanted then.
  // A block of the arena is verified as in gather, for which its values are read in any case: with
  // a mismatch it is left out, and counted in *sequence.mismatches.
  virtual void streamed_attention(const DecodeAttentionArgs& args, Stream& stream) = 0;
  // streamed_attention of keys alone (args.out is null), with the sketches' keys for blocks that
  // have no slot: the arena is not read. REQUIRES: the sequences keep sketches.
  virtual void sketched_attention(const DecodeAttentionArgs& args, Stream& stream) = 0;
  virtual void pack_blocks(const PackBlocksArgs& args, Stream& stream) = 0;
  virtual void unpack_blocks(const UnpackBlocksArgs& args, Stream& stream) = 0;
  virtual void write_through(const WriteThroughArgs& args, Stream& stream) = 0;
  virtual void sketch_blocks(const SketchBlocksArgs& args, Stream& stream) = 0;
  virtual void sketch_filled(const SketchFilledArgs& args, Stream& stream) = 0;
  virtual void advance(const AdvanceArgs& args, Stream& stream) = 0;
  virtual void resolve(const ResolveArgs& args, Stream& stream) = 0;
  virtual void gather(const GatherArgs& args, Stream& stream) = 0;
  virtual void history_append(const HistoryAppendArgs& args, Stream& stream) = 0;
  virtual void predict(const PredictArgs& args, Stream& stream) = 0;
  virtual void select_top(const SelectTopArgs& args, Stream& stream) = 0;
  virtual void select_recent(const SelectRecentArgs& args, Stream& stream) = 0;
  virtual void select_trace(const SelectTraceArgs& args, Stream& stream) = 0;
  virtual void sample(const SampleArgs& args, Stream& stream) = 0;
};

struct CpuDeviceConfig {
  int num_threads = 0;           // 0: as many as the process may run on
  std::size_t memory_bytes = 0;  // the accounted "device memory"; 0: half of the machine's
};
std::unique_ptr<Device> make_cpu_device(const CpuDeviceConfig& config);

struct CudaDeviceConfig {
  int index = 0;                               // of the devices that this process sees
  DataType activation_type = DataType::kBf16;  // kBf16 or kFp16
  double memory_fraction = 0.9;                // of the device's memory: what may be allocated
  std::size_t memory_bytes = 0;                // ... or, where not 0, this
};
// Throws Exception(kDevice) where there is no such device or driver, or where this program was
// built without CUDA.
std::unique_ptr<Device> make_cuda_device(const CudaDeviceConfig& config);
// 0 without a GPU, a driver, or CUDA in this program.
int num_cuda_devices();
// Why that is 0, and what to do.
std::string why_no_cuda_device();
// What tells a GPU from all others, whoever asks, by its number in this process. Throws
// Exception(kDevice).
std::string cuda_device_id(int index);

}  // namespace foretoken::kernels
