// A finished request as JSON: what `generate --json` prints.
#pragma once

#include <nlohmann/json.hpp>

#include "common/messages.h"

namespace foretoken::launch {

// {"policy", "budget_tokens", "recall", "kl", "blocks_predicted", ...}: recall and KL are means
// over the audited steps, null where none was audited.
nlohmann::ordered_json to_json(const KvReport& kv);

// {"prompt_ids", "token_ids", "text", "finish_reason", "logprobs", "usage", "kv", "timing_ms"}.
nlohmann::ordered_json to_json(const DoneMessage& done, bool with_logprobs);

// One line for people: tokens, times and KV.
std::string summary(const DoneMessage& done);

}  // namespace foretoken::launch
