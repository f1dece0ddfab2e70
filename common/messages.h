// Messages: all that processes say to each other over ZeroMQ. Plain structs, no pointers, encoded
// as msgpack maps by common/wire.h. docs/formats.md gives each field.
//
//   client <-> coordinator     GenerateRequest ... TokenMessage, DoneMessage, ErrorMessage
//   coordinator <-> worker     Hello, Welcome, Ready, StepPlan, StepResult, Heartbeat
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "common/ids.h"
#include "common/prefix_key.h"
#include "common/result.h"

namespace foretoken {

inline constexpr int kWireVersion = 1;

// ---- sampling --------------------------------------------------------------------------------

struct SamplingParams {
  float temperature = 1.0F;  // below 1e-5: greedy
  int top_k = 0;             // 0: off
  float top_p = 1.0F;        // 1: off
  float min_p = 0.0F;        // 0: off
  float repetition_penalty = 1.0F;
  float presence_penalty = 0.0F;
  float frequency_penalty = 0.0F;
  std::uint64_t seed = 0;
  int num_logprobs = 0;  // best tokens to report; <= 20

  bool operator==(const SamplingParams&) const = default;
};

struct TokenLogprob {
  TokenId id = 0;
  float logprob = 0;
  bool operator==(const TokenLogprob&) const = default;
};

struct TokenInfo {
  TokenId id = 0;
  float logprob = 0;
  std::vector<TokenLogprob> top;  // best first
  bool operator==(const TokenInfo&) const = default;
};

// ---- client <-> coordinator ------------------------------------------------------------------

// One of prompt (text) and prompt_ids is given.
struct GenerateRequest {
  std::string request_id;  // the client's name for it, echoed; unique in its connection
  std::optional<std::string> prompt;
  std::optional<std::vector<TokenId>> prompt_ids;
  bool add_special_tokens = true;  // of a text prompt: BOS, where the tokenizer has one
  std::optional<int> max_tokens;   // none: 256, or what the context leaves
  SamplingParams sampling;
  std::vector<std::string> stop;  // strings that end the output, not part of it
  std::vector<TokenId> stop_token_ids;
  bool ignore_eos = false;
  bool stream = true;  // token messages as they come; else only `done`
  // Tokens that are taken instead of sampled ones (evaluation); logprobs are still the model's.
  std::vector<TokenId> forced_ids;
};
struct CancelRequest {
  std::string request_id;
};
struct StatusRequest {};
struct ModelsRequest {};
struct DrainRequest {};
using ClientRequest =
    std::variant<GenerateRequest, CancelRequest, StatusRequest, ModelsRequest, DrainRequest>;

// May be empty: the request lives, and its client is still there.
struct TokenMessage {
  std::string request_id;
  std::vector<TokenInfo> tokens;
  std::string text;  // what they add, cut at UTF-8 borders
};

struct Usage {
  std::int64_t prompt_tokens = 0;
  std::int64_t completion_tokens = 0;
  std::int64_t cached_tokens = 0;  // of the prompt, reused and never computed for it
};

// What became of a request's KV, summed over ranks.
struct KvReport {
  std::string policy;
  int budget_tokens = 0;
  double recall_sum = 0;  // attention mass kept, over audited steps, layers and query heads
  std::int64_t recall_count = 0;
  double kl_sum = 0;  // KL(dense || sparse) of the next token, over audited steps; rank 0's
  std::int64_t kl_count = 0;
  std::int64_t blocks_predicted = 0;
  std::int64_t blocks_fetched = 0;
  std::int64_t bytes_host = 0;  // fetched from host memory, or read there by calibrations
  std::int64_t bytes_nvme = 0;
  std::int64_t late = 0;  // blocks that were not there in time
  // Reads of blocks in host memory that failed their check; and lives of the request before this
  // one that ended so: its KV was computed anew.
  std::int64_t checksum_failures = 0;
  std::int64_t losses = 0;
  // Times that a map's scores were not finite, so that its latest blocks were taken instead.
  std::int64_t predictor_fallbacks = 0;
  // Times that a head attended all blocks in a step, as its last audit was below --min-recall, and
  // times that --max-dense-heads kept one from it.
  std::int64_t dense_fallbacks = 0;
  std::int64_t dense_capped = 0;
  bool spilled = false;            // policy auto: it was predicted, all of it or from some token on
  std::int64_t device_bytes = 0;   // slots, tables, history and sketches of the sequence
  std::int64_t full_kv_bytes = 0;  // the same context's whole KV
};

struct Timing {
  double queue_ms = 0;
  double prefill_ms = 0;  // admission to first token
  double decode_ms = 0;   // first to last token
  double total_ms = 0;
  // Median over the tokens after the first: what the step of each took on the slowest rank.
  double step_ms = 0;
};

struct DoneMessage {
  std::string request_id;
  std::string finish_reason;  // stop | length | cancelled
  std::vector<TokenId> prompt_ids;
  std::vector<TokenInfo> tokens;  // all of them
  std::string text;               // all of it
  Usage usage;
  KvReport kv;
  Timing timing;
};
struct ErrorMessage {
  std::string request_id;  // empty: the frame could not be read
  std::string code;        // error_code_name
  std::string message;     // what, why, what to do
};
// The store's NVMe tier, all heads of the node together; counts since the store's start.
struct KvNvme {
  std::string state = "off";  // off | online | read-only | offline
  std::int64_t slabs_total = 0;
  std::int64_t slabs_held = 0;
  std::int64_t slabs_read = 0;     // brought back into host memory
  std::int64_t slabs_written = 0;  // written behind
  std::int64_t bytes_read = 0;
  std::int64_t bytes_written = 0;
  std::int64_t evictions = 0;
  std::int64_t dropped = 0;  // slabs that left host memory before they could be written
  std::int64_t io_errors = 0;
  std::int64_t checksum_failures = 0;
  std::int64_t host_checksum_failures = 0;  // slabs in host memory that weren't written for it
  std::int64_t tokens_passed_over = 0;      // it had, but computing them anew takes less time
};
struct StatusReply {
  std::string state;  // loading | ready | draining | failed
  std::string detail;
  std::string model;
  std::string device;
  int tensor_parallel_size = 0;
  std::int64_t max_model_len = 0;
  std::int64_t requests_running = 0;
  std::int64_t requests_waiting = 0;
  std::int64_t requests_of_client = 0;  // of the connection that asks: running and waiting
  std::int64_t kv_slabs_total = 0;
  std::int64_t kv_slabs_used = 0;
  std::int64_t kv_slabs_cached = 0;
  KvNvme kv_nvme;
  std::int64_t worker_restarts = 0;
  double uptime_s = 0;
};
struct ModelsReply {
  std::vector<std::string> models;
  std::int64_t max_model_len = 0;
};
struct DrainReply {};
using ServerMessage =
    std::variant<TokenMessage, DoneMessage, ErrorMessage, StatusReply, ModelsReply, DrainReply>;

// ---- coordinator <-> worker ------------------------------------------------------------------

// A rank's first word. Messages of an old epoch are dropped by both sides.
struct Hello {
  int group = 0;
  int rank = 0;
  int world_size = 0;
  std::int64_t pid = 0;
  std::string host;
  int life = 0;  // of the group, as the parent that starts it counts them; 0: nobody does
};
struct Welcome {
  Epoch epoch{};
  std::string config_json;   // ServiceConfig
  std::string store_socket;  // path of the node's kvstore
};
// Slabs a head of the head that has the fewest to give. Free ones may not be ready yet: the store
// pre-faults its arena in the background, and an admission takes ready ones only.
struct KvSlabs {
  std::int64_t total = 0;  // of an arena whose memory ran out while it was touched: what there is
  std::int64_t free = 0;
  std::int64_t cached = 0;
  std::int64_t ready = 0;
  KvNvme nvme = {};
};
// The model is loaded; the rank waits for plans.
struct Ready {
  Epoch epoch{};
  int group = 0;
  int rank = 0;
  std::string model_hash;
  std::string device;
  std::int64_t max_model_len = 0;
  int max_batched_tokens = 0;  // of prefill, a step: only ranks know what suits their device
  std::int64_t device_bytes_free = 0;  // for sequences
  KvSlabs kv_slabs;
};

// A sequence comes in: ranks reserve its KV, and answer with AdmitResult.
struct AdmitSequence {
  SequenceId sequence{};
  std::vector<TokenId> prompt;
  // The last of `prompt` that were sampled before a restart: output, as penalties count it.
  std::int64_t num_generated = 0;
  std::int64_t max_length = 0;  // prompt + max_tokens
  SamplingParams sampling;
  std::vector<TokenId> forced_ids;
  std::vector<PrefixKey> prefix_keys;  // of the prompt's segments that may be reused
  bool dense = false;                  // policy auto: with room on the device for all its blocks
};
// All ranks agreed on how much of the prefix is reused: a multiple of 256 tokens.
struct StartSequence {
  SequenceId sequence{};
  std::int64_t reused_tokens = 0;
};
// Tokens [token_begin, token_end) of the prompt through layers [layer_begin, layer_end).
// Items of a sequence come layer by layer, and in token order within a layer; the item that ends
// both the last layer and the prompt samples the first token.
struct PrefillItem {
  SequenceId sequence{};
  int layer_begin = 0;
  int layer_end = 0;
  std::int64_t token_begin = 0;
  std::int64_t token_end = 0;
};
// Segment `index` of the sequence is complete and its tokens are accepted: make it reusable.
struct PublishSegment {
  SequenceId sequence{};
  int index = 0;
  PrefixKey key{};
};
// What every rank of a group does in one step, in this order.
struct StepPlan {
  Epoch epoch{};
  StepNumber step{};
  std::vector<SequenceId> releases;
  std::vector<PublishSegment> publishes;
  std::vector<SequenceId> spills;  // dense ones, whose blocks leave the device but for the budget's
  std::vector<AdmitSequence> admits;
  std::vector<StartSequence> starts;
  std::vector<PrefillItem> prefills;
  std::vector<SequenceId> decodes;  // one more token each, from the last one sampled
};

// The answer to an AdmitSequence, and to a StartSequence.
struct AdmitResult {
  SequenceId sequence{};
  std::int64_t reusable_tokens = 0;
  // kExhausted: try again when others have ended; kPending: soon, its prefix comes from NVMe.
  std::optional<Error> error;
  bool device_is_full = false;  // kExhausted, and device memory is what lacks
};
struct SequenceToken {
  SequenceId sequence{};
  std::int64_t position = 0;  // in the sequence: the first sampled one stands behind the prompt
  TokenInfo token;
};
// One rank's counters for one sequence, since it was admitted.
struct SequenceStats {
  SequenceId sequence{};
  KvReport kv;  // policy and budget left empty
};
// KV of it failed its check (kCorrupt), a disk failed, or its logits are not finite (kDevice). The
// step's token of it, and those of later steps, count for nothing.
struct LostSequence {
  SequenceId sequence{};
  Error error;
  std::int64_t checksum_failures = 0;  // reads of blocks in host memory
};
struct StepResult {
  Epoch epoch{};
  StepNumber step{};
  int group = 0;
  int rank = 0;
  std::vector<AdmitResult> admits;    // of the plan's admits and starts
  std::vector<SequenceToken> tokens;  // rank 0 in full; others none
  std::uint64_t token_digest = 0;     // of the step's tokens: equal on every rank
  std::vector<SequenceStats> stats;   // of the sequences released by this plan
  std::vector<LostSequence> lost;     // of those that the plan works on
  std::int64_t device_bytes_free = 0;
  std::optional<KvSlabs> kv_slabs;  // where the plan has admits, publishes or releases
  std::int64_t step_us = 0;         // time the step took on this rank
  std::int64_t launch_us = 0;       // ... of which the host launched steps: on a CPU, all of it
};
struct Heartbeat {
  Epoch epoch{};
  int group = 0;
  int rank = 0;
};
// The rank can't go on; it exits after this.
struct WorkerFailed {
  Epoch epoch{};
  int group = 0;
  int rank = 0;
  Error error;
};
// Answers each Heartbeat, so that a rank whose coordinator is gone ends by itself.
struct HeartbeatEcho {};
struct Shutdown {};
using WorkerMessage = std::variant<Hello, Ready, StepResult, Heartbeat, WorkerFailed>;
using CoordinatorMessage = std::variant<Welcome, StepPlan, HeartbeatEcho, Shutdown>;

}  // namespace foretoken
