// What a GenerateRequest may ask for. The caps stand here; each error names the field, what it
// takes and, where there is one, the flag that changes it.
//
// Pure functions. Example: tests/coordinator/request_check_test.cc
#pragma once

#include <cstdint>
#include <vector>

#include "common/messages.h"

namespace foretoken::coordinator {

inline constexpr std::size_t kMaxRequestIdBytes = 128;
inline constexpr std::size_t kMaxStopStrings = 16;
inline constexpr std::size_t kMaxStopBytes = 256;
inline constexpr std::size_t kMaxStopTokens = 256;
inline constexpr int kMaxLogprobs = 20;
inline constexpr int kDefaultMaxTokens = 256;

// Everything but the prompt's length. Error: kInvalidArgument.
Status check_request(const GenerateRequest& request, std::int64_t vocab_size);

// Whether prompt and output fit the context. The result: how many tokens to make at most.
// Error: kInvalidArgument.
Result<int> check_length(std::size_t prompt_tokens, const std::optional<int>& max_tokens,
                         std::int64_t context);

}  // namespace foretoken::coordinator
