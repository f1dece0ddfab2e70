// PrefixKey: what names a segment of KV, wherever it lies and whoever made it. A SHA-256 chain:
//
//   root     = SHA-256("foretoken-kv-1", tenant salt, model hash, KV type)
//   key of segment i = SHA-256(key of segment i - 1 (or root), compute tag, its 256 tokens)
//
// Every part is prefixed with its length, so that no two lists of parts give the same bytes. The
// compute tag says how the KV was computed ("dense", or policy and budget): sparse KV is never
// served as dense. No tensor-parallel layout is in it: presence is per KV head.
//
// Pure functions; thread-safe. Example: tests/common/prefix_key_test.cc
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string_view>

#include "common/ids.h"

namespace foretoken {

struct PrefixKey {
  std::array<std::uint8_t, 32> bytes{};
  auto operator<=>(const PrefixKey&) const = default;
};

// kv_type: "fp16" or "bf16". tenant_salt: secret, so that tenants can't probe each other's
// prefixes.
PrefixKey root_key(std::string_view tenant_salt, std::string_view model_hash,
                   std::string_view kv_type);

// REQUIRES: tokens.size() == kSegmentTokens.
PrefixKey prefix_key(const PrefixKey& parent, std::string_view compute_tag,
                     std::span<const TokenId> tokens);

}  // namespace foretoken

// The key is a hash already: its first bytes serve.
template <>
struct std::hash<foretoken::PrefixKey> {
  std::size_t operator()(const foretoken::PrefixKey& key) const noexcept {
    std::size_t value = 0;
    std::memcpy(&value, key.bytes.data(), sizeof value);
    return value;
  }
};
