// FakeRank: a rank without a model. Its tokens are a pure function of the tokens before them, so
// any run can be compared with reference_tokens(). It checks that each plan makes sense after the
// ones before it, and throws std::logic_error where a plan breaks the rules of common/messages.h.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "common/messages.h"

namespace foretoken::coordinator {

// What a node's KV store is to its ranks: slabs, and which prefixes are there.
struct FakeStore {
  std::int64_t slabs = 1024;
  std::int64_t used = 0;
  std::int64_t ready = std::numeric_limits<std::int64_t>::max();  // pre-faulted so far
  int pending_admits = 0;  // so many of sequences that have prefix keys: they come from NVMe
  int refuse_starts = 0;   // so many of sequences that share a prefix: there is no room to swap
  int losses = 0;          // decoding sequences whose KV is found to be lost, in so many steps
  ErrorCode loss = ErrorCode::kCorrupt;
  std::set<PrefixKey> published;
};

struct FakeRankConfig {
  int group = 0;
  int rank = 0;
  int world_size = 1;
  int num_layers = 2;
  int max_num_seqs = 8;
  int max_batched_tokens = 512;
  std::int64_t max_model_len = 4096;
  int vocab = 257;
  int eos = 256;
  // What fits the device, under policy auto: a dense sequence takes its greatest length, another
  // one the budget at most.
  std::optional<std::int64_t> device_tokens;
  std::int64_t budget_tokens = 144;
  int eos_every = 64;  // one token in so many is the end token; 0: none
  // What a step says that it took.
  std::int64_t decode_us = 1000;
  std::int64_t token_layer_us = 10;
};

inline constexpr std::int64_t kFakeDeviceBytes = 1000;  // each sequence takes one

// The token that follows these.
TokenId next_token(std::span<const TokenId> tokens, std::uint64_t seed,
                   const FakeRankConfig& config);
// What a request gets that nothing disturbs: up to max_tokens, through the end token.
std::vector<TokenId> reference_tokens(std::vector<TokenId> prompt, std::uint64_t seed,
                                      int max_tokens, const FakeRankConfig& config);

class FakeRank {
 public:
  FakeRank(const FakeRankConfig& config, std::shared_ptr<FakeStore> store);
  ~FakeRank();

  Ready ready(Epoch epoch) const;
  StepResult run(const StepPlan& plan);
  std::size_t num_sequences() const { return sequences_.size(); }

 private:
  struct Sequence {
    std::vector<TokenId> tokens;
    std::size_t prompt = 0;
    std::int64_t max_length = 0;
    std::uint64_t seed = 0;
    std::vector<TokenId> forced;
    std::int64_t slabs = 0;
    bool dense = false;
    std::size_t dense_tokens = std::numeric_limits<std::size_t>::max();  // at most so many are
    std::int64_t reusable = 0;
    bool started = false;
    std::int64_t reused = 0;
    int layer = 0;
    std::int64_t token = 0;
    bool prefilled = false;
  };
  Sequence& find(SequenceId id);
  AdmitResult admit(const AdmitSequence& admit);
  AdmitResult start(const StartSequence& start);
  void prefill(const PrefillItem& item, StepResult& result);
  void sample(SequenceId id, StepResult& result);
  void free(const Sequence& sequence);
  KvSlabs count_slabs() const;
  std::int64_t device_tokens(std::int64_t max_length, bool dense) const;

  const FakeRankConfig config_;
  std::shared_ptr<FakeStore> store_;
  std::map<SequenceId, Sequence> sequences_;
  std::optional<SequenceId> in_prefill_;  // the last one whose prefill has begun
  std::uint64_t last_step_ = 0;
};

}  // namespace foretoken::coordinator
