#include "launch/internal/report.h"

#include <spdlog/fmt/fmt.h>

namespace foretoken::launch {
namespace {

using Json = nlohmann::ordered_json;

Json mean(double sum, std::int64_t count) {
  return count > 0 ? Json(sum / static_cast<double>(count)) : Json(nullptr);
}

Json to_json(const TokenInfo& token) {
  Json top = Json::array();
  for (const TokenLogprob& entry : token.top) top.push_back({entry.id, entry.logprob});
  return {{"token", token.id}, {"logprob", token.logprob}, {"top", top}};
}

double per_second(std::int64_t count, double ms) {
  return ms > 0 ? 1000.0 * static_cast<double>(count) / ms : 0.0;
}

}  // namespace

Json to_json(const KvReport& kv) {
  return {{"policy", kv.policy},
          {"budget_tokens", kv.budget_tokens},
          {"recall", mean(kv.recall_sum, kv.recall_count)},
          {"kl", mean(kv.kl_sum, kv.kl_count)},
          {"blocks_predicted", kv.blocks_predicted},
          {"blocks_fetched", kv.blocks_fetched},
          {"bytes_host", kv.bytes_host},
          {"bytes_nvme", kv.bytes_nvme},
          {"late", kv.late},
          {"predictor_fallbacks", kv.predictor_fallbacks},
          {"dense_fallbacks", kv.dense_fallbacks},
          {"dense_capped", kv.dense_capped},
          {"checksum_failures", kv.checksum_failures},
          {"losses", kv.losses},
          {"spilled", kv.spilled},
          {"device_bytes", kv.device_bytes},
          {"full_kv_bytes", kv.full_kv_bytes}};
}

Json to_json(const DoneMessage& done, bool with_logprobs) {
  Json ids = Json::array();
  Json logprobs = Json::array();
  for (const TokenInfo& token : done.tokens) {
    ids.push_back(token.id);
    if (with_logprobs) logprobs.push_back(to_json(token));
  }
  return {{"prompt_ids", done.prompt_ids},
          {"token_ids", ids},
          {"text", done.text},
          {"finish_reason", done.finish_reason},
          {"logprobs", logprobs},
          {"usage",
           {{"prompt_tokens", done.usage.prompt_tokens},
            {"completion_tokens", done.usage.completion_tokens},
            {"cached_tokens", done.usage.cached_tokens}}},
          {"kv", to_json(done.kv)},
          {"timing_ms",
           {{"queue", done.timing.queue_ms},
            {"prefill", done.timing.prefill_ms},
            {"decode", done.timing.decode_ms},
            {"total", done.timing.total_ms},
            {"step", done.timing.step_ms}}}};
}

std::string summary(const DoneMessage& done) {
  const Usage& usage = done.usage;
  std::string line = fmt::format(
      "{} prompt tokens ({} cached) at {:.0f} tokens/s, {} tokens at {:.1f} tokens/s, {}",
      usage.prompt_tokens, usage.cached_tokens,
      per_second(usage.prompt_tokens - usage.cached_tokens, done.timing.prefill_ms),
      usage.completion_tokens, per_second(usage.completion_tokens - 1, done.timing.decode_ms),
      done.kv.policy);
  if (done.kv.recall_count > 0) {
    line += fmt::format(", recall {:.3f}",
                        done.kv.recall_sum / static_cast<double>(done.kv.recall_count));
  }
  return line;
}

}  // namespace foretoken::launch
