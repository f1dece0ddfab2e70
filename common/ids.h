// Ids: each kind its own type, so that two kinds can't be swapped.
#pragma once

#include <cstdint>
#include <type_traits>

namespace foretoken {

enum class RequestId : std::uint64_t {};   // one request, unique in a coordinator's life
enum class SequenceId : std::uint64_t {};  // a request's tokens on a worker group
enum class StepNumber : std::uint64_t {};  // plans of an epoch are numbered from 1
enum class Epoch : std::uint32_t {};       // one life of a worker group; rises at each restart

template <typename Id>
constexpr auto raw(Id id) {
  return static_cast<std::underlying_type_t<Id>>(id);
}

using TokenId = std::int32_t;

// Units of the KV cache (docs/architecture.md, "KV").
inline constexpr int kBlockTokens = 16;     // a block: what is predicted, fetched and budgeted
inline constexpr int kSegmentTokens = 256;  // a segment: what is shared as a prefix
inline constexpr int kSegmentBlocks = kSegmentTokens / kBlockTokens;
inline constexpr int kSinkTokens = 64;   // always resident: the first tokens ...
inline constexpr int kLocalTokens = 64;  // ... and every block that touches the last ones

constexpr int blocks_for(std::int64_t tokens) {
  return static_cast<int>((tokens + kBlockTokens - 1) / kBlockTokens);
}
constexpr int segments_for(std::int64_t tokens) {
  return static_cast<int>((tokens + kSegmentTokens - 1) / kSegmentTokens);
}

}  // namespace foretoken
