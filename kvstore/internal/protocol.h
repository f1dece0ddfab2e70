// Protocol: what a rank and the store say to each other, one message a SEQPACKET datagram: a
// msgpack array [kind, fields...] (docs/formats.md, "Store protocol"). Requests that are answered:
// Hello -> Welcome, Reserve and Use -> Granted, StatRequest -> StoreStat, FindKey -> FileKey,
// FindWeights, KeepWeights and WeightsFilled -> WeightMemory, each or Error. Commit, Publish,
// Distrust, Refute, NvmeFaults, PrefillTimes, Release and Goodbye are one-way.
//
// Decoding trusts nothing: size, kinds, counts and ranges are checked, extension types refused.
// Never throws. Error: kCorrupt, naming the field.
// Example: tests/kvstore/protocol_test.cc; fuzzed by tests/fuzz/store_protocol_fuzz.cc
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "common/ids.h"
#include "common/prefix_key.h"
#include "common/result.h"
#include "common/sequence_limit.h"
#include "kvstore/internal/kv_cipher.h"
#include "kvstore/internal/model_identity.h"
#include "kvstore/internal/store_book.h"
#include "kvstore/kv_store.h"

namespace foretoken::kvstore {

inline constexpr int kProtocolVersion = 9;
inline constexpr std::size_t kMaxMessageBytes = 192 << 10;  // fits a default socket buffer
inline constexpr int kMaxGrantSlabs = 40'000;               // a sequence: slabs, and slots on NVMe
inline constexpr int kMaxHeads = 1'024;
inline constexpr int kMaxLayers = 1'024;
inline constexpr int kMaxHeadDim = 1'024;
inline constexpr int kMaxGroups = 4'096;
inline constexpr int kMaxRanks = 4'096;

struct Hello {
  int version = kProtocolVersion;
  LeaseOwner owner;
  ModelIdentity model;
};
struct Reserve {
  SequenceId sequence{};
  int num_segments = 0;
  std::vector<PrefixKey> keys;
};
struct Use {
  SequenceId sequence{};
  int hit_segments = 0;
};
struct Commit {
  SequenceId sequence{};
  int segment = 0;
  PrefixKey key;
};
// Of a sequence that runs from NVMe: the segment's slots hold it on all heads of the rank, whole
// but for their headers.
struct Publish {
  SequenceId sequence{};
  int segment = 0;
  PrefixKey key;
  std::vector<std::uint64_t> digests;  // [num_heads] of the slabs' checksums
  std::vector<Seal> seals;             // [num_heads] of their tables; none: not encrypted
};
// ... and a slot that it reads as a prefix, or has published, failed its check.
struct Refute {
  SequenceId sequence{};
  int head = 0;  // of the rank's
  int segment = 0;
};
struct Release {
  SequenceId sequence{};
};
struct Distrust {
  SequenceId sequence{};
};
// Of the rank's own reads and writes on NVMe, since it last told: NvmeStat's.
struct NvmeFaults {
  std::int64_t io_errors = 0;
  std::int64_t checksum_failures = 0;
};
struct StatRequest {};
// The key of the NVMe file, which the rank is to read and write runs of.
struct FindKey {};
// The rank has unmapped the arena: its lease may end although its process lives.
struct Goodbye {};
// The copy of the weights. These three come without a Hello: a rank loads before it says that.
struct FindWeights {
  int version = kProtocolVersion;
  std::string model_hash;
};
struct KeepWeights {
  int version = kProtocolVersion;
  std::string model_hash;
  std::uint64_t bytes = 0;
};
// The rank has unmapped what KeepWeights gave it, and all bytes are there.
struct WeightsFilled {};
using Request =
    std::variant<Hello, Reserve, Use, Commit, Release, StatRequest, Goodbye, Distrust, NvmeFaults,
                 FindWeights, KeepWeights, WeightsFilled, Publish, Refute, PrefillTimes, FindKey>;

// Comes with the arena's file descriptor (SCM_RIGHTS).
struct Welcome {
  std::uint64_t slab_bytes = 0;
  std::uint32_t slabs_per_head = 0;
  bool encrypts_nvme = false;  // a rank asks for its key before it has runs there
};
// Comes with a pipe's end that holds the key (SCM_RIGHTS): it stands in no message.
struct FileKey {
  CipherKind cipher{};
};
// Comes with the memory's file descriptor (SCM_RIGHTS).
struct WeightMemory {
  std::uint64_t bytes = 0;
};
using Reply = std::variant<Error, Welcome, Grant, StoreStat, WeightMemory, FileKey>;

std::string encode(const Request& request);
std::string encode(const Reply& reply);
Result<Request> decode_request(std::string_view bytes);
Result<Reply> decode_reply(std::string_view bytes);

}  // namespace foretoken::kvstore
