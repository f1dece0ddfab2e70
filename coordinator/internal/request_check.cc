#include "coordinator/request_check.h"

#include <algorithm>
#include <cstdio>

namespace foretoken::coordinator {
namespace {

Error invalid(const std::string& why) { return {ErrorCode::kInvalidArgument, why}; }

Status check_range(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return Ok{};  // not so for NaN
  char text[160];
  std::snprintf(text, sizeof text, "%s must be in [%g, %g], not %g", name, least, most, value);
  return invalid(text);
}

Status check_sampling(const SamplingParams& sampling) {
  constexpr double kMost = 1e6;
  FT_RETURN_IF_ERROR(check_range("temperature", sampling.temperature, 0, 100));
  FT_RETURN_IF_ERROR(check_range("top_k", sampling.top_k, 0, 1 << 30));
  FT_RETURN_IF_ERROR(check_range("top_p", sampling.top_p, 1e-6, 1));
  FT_RETURN_IF_ERROR(check_range("min_p", sampling.min_p, 0, 1));
  FT_RETURN_IF_ERROR(
      check_range("repetition_penalty", sampling.repetition_penalty, 1 / kMost, kMost));
  FT_RETURN_IF_ERROR(check_range("presence_penalty", sampling.presence_penalty, -2, 2));
  FT_RETURN_IF_ERROR(check_range("frequency_penalty", sampling.frequency_penalty, -2, 2));
  return check_range("num_logprobs", sampling.num_logprobs, 0, kMaxLogprobs);
}

Status check_ids(const char* name, const std::vector<TokenId>& ids, std::int64_t vocab_size) {
  const auto wrong =
      std::find_if(ids.begin(), ids.end(), [&](TokenId id) { return id < 0 || id >= vocab_size; });
  if (wrong == ids.end()) return Ok{};
  return invalid(std::string(name) + " has the id " + std::to_string(*wrong) +
                 "; the model's ids are 0 to " + std::to_string(vocab_size - 1));
}

Status check_stops(const GenerateRequest& request) {
  if (request.stop.size() > kMaxStopStrings) {
    return invalid("stop has " + std::to_string(request.stop.size()) + " strings, at most " +
                   std::to_string(kMaxStopStrings) + " are taken");
  }
  for (const auto& stop : request.stop) {
    if (stop.empty()) return invalid("stop has an empty string, which would stop everything");
    if (stop.size() > kMaxStopBytes) {
      return invalid("stop has a string of " + std::to_string(stop.size()) + " bytes, at most " +
                     std::to_string(kMaxStopBytes) + " are taken");
    }
  }
  if (request.stop_token_ids.size() > kMaxStopTokens) {
    return invalid("stop_token_ids has " + std::to_string(request.stop_token_ids.size()) +
                   " ids, at most " + std::to_string(kMaxStopTokens) + " are taken");
  }
  return Ok{};
}

Status check_request_id(const std::string& id) {
  const bool printable =
      std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < 127; });
  if (!id.empty() && id.size() <= kMaxRequestIdBytes && printable) return Ok{};
  return invalid("request_id must be 1 to " + std::to_string(kMaxRequestIdBytes) +
                 " printable ASCII characters without spaces");
}

}  // namespace

Status check_request(const GenerateRequest& request, std::int64_t vocab_size) {
  FT_RETURN_IF_ERROR(check_request_id(request.request_id));
  if (request.prompt.has_value() == request.prompt_ids.has_value()) {
    return invalid("one of prompt and prompt_ids must be given");
  }
  if (request.prompt && request.prompt->empty()) return invalid("the prompt is empty");
  if (request.max_tokens && *request.max_tokens < 1) {
    return invalid("max_tokens must be at least 1, not " + std::to_string(*request.max_tokens));
  }
  FT_RETURN_IF_ERROR(check_sampling(request.sampling));
  FT_RETURN_IF_ERROR(check_stops(request));
  if (request.prompt_ids) {
    FT_RETURN_IF_ERROR(check_ids("prompt_ids", *request.prompt_ids, vocab_size));
  }
  const auto most = static_cast<std::size_t>(request.max_tokens.value_or(kDefaultMaxTokens));
  if (request.forced_ids.size() > most) {
    return invalid("forced_ids has " + std::to_string(request.forced_ids.size()) +
                   " ids; max_tokens asks for " + std::to_string(most) + " tokens");
  }
  FT_RETURN_IF_ERROR(check_ids("forced_ids", request.forced_ids, vocab_size));
  return check_ids("stop_token_ids", request.stop_token_ids, vocab_size);
}

Result<int> check_length(std::size_t prompt_tokens, const std::optional<int>& max_tokens,
                         std::int64_t context) {
  const auto prompt = static_cast<std::int64_t>(prompt_tokens);
  const auto limit =
      " the context has " + std::to_string(context) + " (--max-model-len, at most the model's own)";
  if (prompt == 0) return invalid("the prompt is empty");
  if (prompt >= context) {
    return invalid("the prompt has " + std::to_string(prompt) + " tokens;" + limit +
                   " and needs room for one more");
  }
  if (max_tokens && *max_tokens > context - prompt) {
    return invalid("the prompt's " + std::to_string(prompt) + " tokens and max_tokens " +
                   std::to_string(*max_tokens) + " are too many;" + limit +
                   "; shorten the prompt, or ask for at most " + std::to_string(context - prompt));
  }
  if (max_tokens) return *max_tokens;
  return static_cast<int>(std::min<std::int64_t>(kDefaultMaxTokens, context - prompt));
}

}  // namespace foretoken::coordinator
