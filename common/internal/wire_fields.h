// The names of all messages and of their fields on the wire, each once. visit_fields(f, message)
// calls f(name, field) for each field; the writer and the reader in wire.cc are two such f.
// docs/formats.md explains the fields; a change of meaning raises kWireVersion.
#pragma once

#include <concepts>
#include <string_view>
#include <type_traits>

#include "common/messages.h"

namespace foretoken::internal {

// M is T or const T.
template <typename M, typename T>
concept Is = std::same_as<std::remove_const_t<M>, T>;

// The "type" of a frame.
template <typename T>
inline constexpr std::string_view kTypeName = "";
template <>
inline constexpr std::string_view kTypeName<GenerateRequest> = "generate";
template <>
inline constexpr std::string_view kTypeName<CancelRequest> = "cancel";
template <>
inline constexpr std::string_view kTypeName<StatusRequest> = "status";
template <>
inline constexpr std::string_view kTypeName<ModelsRequest> = "models";
template <>
inline constexpr std::string_view kTypeName<DrainRequest> = "drain";
template <>
inline constexpr std::string_view kTypeName<TokenMessage> = "token";
template <>
inline constexpr std::string_view kTypeName<DoneMessage> = "done";
template <>
inline constexpr std::string_view kTypeName<ErrorMessage> = "error";
template <>
inline constexpr std::string_view kTypeName<StatusReply> = "status_reply";
template <>
inline constexpr std::string_view kTypeName<ModelsReply> = "models_reply";
template <>
inline constexpr std::string_view kTypeName<DrainReply> = "drain_reply";
template <>
inline constexpr std::string_view kTypeName<Hello> = "hello";
template <>
inline constexpr std::string_view kTypeName<Welcome> = "welcome";
template <>
inline constexpr std::string_view kTypeName<Ready> = "ready";
template <>
inline constexpr std::string_view kTypeName<StepPlan> = "plan";
template <>
inline constexpr std::string_view kTypeName<StepResult> = "result";
template <>
inline constexpr std::string_view kTypeName<Heartbeat> = "heartbeat";
template <>
inline constexpr std::string_view kTypeName<WorkerFailed> = "failed";
template <>
inline constexpr std::string_view kTypeName<HeartbeatEcho> = "heartbeat_echo";
template <>
inline constexpr std::string_view kTypeName<Shutdown> = "shutdown";

// ---- client <-> coordinator ------------------------------------------------------------------

template <typename F>
void visit_fields(F&& f, Is<SamplingParams> auto& m) {
  f("temperature", m.temperature);
  f("top_k", m.top_k);
  f("top_p", m.top_p);
  f("min_p", m.min_p);
  f("repetition_penalty", m.repetition_penalty);
  f("presence_penalty", m.presence_penalty);
  f("frequency_penalty", m.frequency_penalty);
  f("seed", m.seed);
  f("num_logprobs", m.num_logprobs);
}

template <typename F>
void visit_fields(F&& f, Is<TokenLogprob> auto& m) {
  f("id", m.id);
  f("logprob", m.logprob);
}

template <typename F>
void visit_fields(F&& f, Is<TokenInfo> auto& m) {
  f("id", m.id);
  f("logprob", m.logprob);
  f("top", m.top);
}

template <typename F>
void visit_fields(F&& f, Is<GenerateRequest> auto& m) {
  f("request_id", m.request_id);
  f("prompt", m.prompt);
  f("prompt_ids", m.prompt_ids);
  f("add_special_tokens", m.add_special_tokens);
  f("max_tokens", m.max_tokens);
  f("sampling", m.sampling);
  f("stop", m.stop);
  f("stop_token_ids", m.stop_token_ids);
  f("ignore_eos", m.ignore_eos);
  f("stream", m.stream);
  f("forced_ids", m.forced_ids);
}

template <typename F>
void visit_fields(F&& f, Is<CancelRequest> auto& m) {
  f("request_id", m.request_id);
}
template <typename F>
void visit_fields(F&&, Is<StatusRequest> auto&) {}
template <typename F>
void visit_fields(F&&, Is<ModelsRequest> auto&) {}
template <typename F>
void visit_fields(F&&, Is<DrainRequest> auto&) {}

template <typename F>
void visit_fields(F&& f, Is<TokenMessage> auto& m) {
  f("request_id", m.request_id);
  f("tokens", m.tokens);
  f("text", m.text);
}

template <typename F>
void visit_fields(F&& f, Is<Usage> auto& m) {
  f("prompt_tokens", m.prompt_tokens);
  f("completion_tokens", m.completion_tokens);
  f("cached_tokens", m.cached_tokens);
}

template <typename F>
void visit_fields(F&& f, Is<KvReport> auto& m) {
  f("policy", m.policy);
  f("budget_tokens", m.budget_tokens);
  f("recall_sum", m.recall_sum);
  f("recall_count", m.recall_count);
  f("kl_sum", m.kl_sum);
  f("kl_count", m.kl_count);
  f("blocks_predicted", m.blocks_predicted);
  f("blocks_fetched", m.blocks_fetched);
  f("bytes_host", m.bytes_host);
  f("bytes_nvme", m.bytes_nvme);
  f("late", m.late);
  f("checksum_failures", m.checksum_failures);
  f("losses", m.losses);
  f("predictor_fallbacks", m.predictor_fallbacks);
  f("dense_fallbacks", m.dense_fallbacks);
  f("dense_capped", m.dense_capped);
  f("spilled", m.spilled);
  f("device_bytes", m.device_bytes);
  f("full_kv_bytes", m.full_kv_bytes);
}

template <typename F>
void visit_fields(F&& f, Is<Timing> auto& m) {
  f("queue_ms", m.queue_ms);
  f("prefill_ms", m.prefill_ms);
  f("decode_ms", m.decode_ms);
  f("total_ms", m.total_ms);
  f("step_ms", m.step_ms);
}

template <typename F>
void visit_fields(F&& f, Is<DoneMessage> auto& m) {
  f("request_id", m.request_id);
  f("finish_reason", m.finish_reason);
  f("prompt_ids", m.prompt_ids);
  f("tokens", m.tokens);
  f("text", m.text);
  f("usage", m.usage);
  f("kv", m.kv);
  f("timing", m.timing);
}

template <typename F>
void visit_fields(F&& f, Is<ErrorMessage> auto& m) {
  f("request_id", m.request_id);
  f("code", m.code);
  f("message", m.message);
}

template <typename F>
void visit_fields(F&& f, Is<KvNvme> auto& m) {
  f("state", m.state);
  f("slabs_total", m.slabs_total);
  f("slabs_held", m.slabs_held);
  f("slabs_read", m.slabs_read);
  f("slabs_written", m.slabs_written);
  f("bytes_read", m.bytes_read);
  f("bytes_written", m.bytes_written);
  f("evictions", m.evictions);
  f("dropped", m.dropped);
  f("io_errors", m.io_errors);
  f("checksum_failures", m.checksum_failures);
  f("host_checksum_failures", m.host_checksum_failures);
  f("tokens_passed_over", m.tokens_passed_over);
}

template <typename F>
void visit_fields(F&& f, Is<StatusReply> auto& m) {
  f("state", m.state);
  f("detail", m.detail);
  f("model", m.model);
  f("device", m.device);
  f("tensor_parallel_size", m.tensor_parallel_size);
  f("max_model_len", m.max_model_len);
  f("requests_running", m.requests_running);
  f("requests_waiting", m.requests_waiting);
  f("requests_of_client", m.requests_of_client);
  f("kv_slabs_total", m.kv_slabs_total);
  f("kv_slabs_used", m.kv_slabs_used);
  f("kv_slabs_cached", m.kv_slabs_cached);
  f("kv_nvme", m.kv_nvme);
  f("worker_restarts", m.worker_restarts);
  f("uptime_s", m.uptime_s);
}

template <typename F>
void visit_fields(F&& f, Is<ModelsReply> auto& m) {
  f("models", m.models);
  f("max_model_len", m.max_model_len);
}
template <typename F>
void visit_fields(F&&, Is<DrainReply> auto&) {}

// ---- coordinator <-> worker ------------------------------------------------------------------

template <typename F>
void visit_fields(F&& f, Is<Hello> auto& m) {
  f("group", m.group);
  f("rank", m.rank);
  f("world_size", m.world_size);
  f("pid", m.pid);
  f("host", m.host);
  f("life", m.life);
}

template <typename F>
void visit_fields(F&& f, Is<Welcome> auto& m) {
  f("epoch", m.epoch);
  f("config_json", m.config_json);
  f("store_socket", m.store_socket);
}

template <typename F>
void visit_fields(F&& f, Is<KvSlabs> auto& m) {
  f("total", m.total);
  f("free", m.free);
  f("cached", m.cached);
  f("ready", m.ready);
  f("nvme", m.nvme);
}

template <typename F>
void visit_fields(F&& f, Is<Ready> auto& m) {
  f("epoch", m.epoch);
  f("group", m.group);
  f("rank", m.rank);
  f("model_hash", m.model_hash);
  f("device", m.device);
  f("max_model_len", m.max_model_len);
  f("max_batched_tokens", m.max_batched_tokens);
  f("device_bytes_free", m.device_bytes_free);
  f("kv_slabs", m.kv_slabs);
}

template <typename F>
void visit_fields(F&& f, Is<AdmitSequence> auto& m) {
  f("sequence", m.sequence);
  f("prompt", m.prompt);
  f("num_generated", m.num_generated);
  f("max_length", m.max_length);
  f("sampling", m.sampling);
  f("forced_ids", m.forced_ids);
  f("prefix_keys", m.prefix_keys);
  f("dense", m.dense);
}

template <typename F>
void visit_fields(F&& f, Is<StartSequence> auto& m) {
  f("sequence", m.sequence);
  f("reused_tokens", m.reused_tokens);
}

template <typename F>
void visit_fields(F&& f, Is<PrefillItem> auto& m) {
  f("sequence", m.sequence);
  f("layer_begin", m.layer_begin);
  f("layer_end", m.layer_end);
  f("token_begin", m.token_begin);
  f("token_end", m.token_end);
}

template <typename F>
void visit_fields(F&& f, Is<PublishSegment> auto& m) {
  f("sequence", m.sequence);
  f("index", m.index);
  f("key", m.key);
}

template <typename F>
void visit_fields(F&& f, Is<StepPlan> auto& m) {
  f("epoch", m.epoch);
  f("step", m.step);
  f("releases", m.releases);
  f("publishes", m.publishes);
  f("spills", m.spills);
  f("admits", m.admits);
  f("starts", m.starts);
  f("prefills", m.prefills);
  f("decodes", m.decodes);
}

template <typename F>
void visit_fields(F&& f, Is<Error> auto& m) {
  f("code", m.code);
  f("message", m.message);
}

template <typename F>
void visit_fields(F&& f, Is<AdmitResult> auto& m) {
  f("sequence", m.sequence);
  f("reusable_tokens", m.reusable_tokens);
  f("error", m.error);
  f("device_is_full", m.device_is_full);
}

template <typename F>
void visit_fields(F&& f, Is<SequenceToken> auto& m) {
  f("sequence", m.sequence);
  f("position", m.position);
  f("token", m.token);
}

template <typename F>
void visit_fields(F&& f, Is<SequenceStats> auto& m) {
  f("sequence", m.sequence);
  f("kv", m.kv);
}

template <typename F>
void visit_fields(F&& f, Is<LostSequence> auto& m) {
  f("sequence", m.sequence);
  f("error", m.error);
  f("checksum_failures", m.checksum_failures);
}

template <typename F>
void visit_fields(F&& f, Is<StepResult> auto& m) {
  f("epoch", m.epoch);
  f("step", m.step);
  f("group", m.group);
  f("rank", m.rank);
  f("admits", m.admits);
  f("tokens", m.tokens);
  f("token_digest", m.token_digest);
  f("stats", m.stats);
  f("lost", m.lost);
  f("device_bytes_free", m.device_bytes_free);
  f("kv_slabs", m.kv_slabs);
  f("step_us", m.step_us);
  f("launch_us", m.launch_us);
}

template <typename F>
void visit_fields(F&& f, Is<Heartbeat> auto& m) {
  f("epoch", m.epoch);
  f("group", m.group);
  f("rank", m.rank);
}

template <typename F>
void visit_fields(F&& f, Is<WorkerFailed> auto& m) {
  f("epoch", m.epoch);
  f("group", m.group);
  f("rank", m.rank);
  f("error", m.error);
}
template <typename F>
void visit_fields(F&&, Is<HeartbeatEcho> auto&) {}
template <typename F>
void visit_fields(F&&, Is<Shutdown> auto&) {}

}  // namespace foretoken::internal
