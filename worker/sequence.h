// Sequence: what a rank keeps of one request: its tokens (on the device), its KV (slots in device
// memory, slabs in the store's arena), the tables between the two, its slots' block maxima where
// the policy observes attention, sketches of its keys where it calibrates by them, and the policy's
// state.
// Allocated whole at admission, for the greatest length it may reach; freed whole, but for the
// slots that a dense one gives up when it spills.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/messages.h"
#include "kernels/device.h"
#include "kvstore/kv_store.h"
#include "predictor/policy.h"
#include "worker/pinned.h"

namespace foretoken::worker {

inline constexpr int kLocalBlocks = kLocalTokens / kBlockTokens + 1;  // it may start inside one

class Sequence {
 public:
  // Throws Exception(kExhausted) when the device is full.
  Sequence(const AdmitSequence& admit, kvstore::Reservation reservation,
           const kernels::KvShape& shape, predictor::Policy& policy, kernels::Device& device,
           kernels::Stream& stream);

  SequenceId id() const { return id_; }
  // Tokens, the one that a step in flight draws included; the last one's KV is not stored yet.
  int length() const { return length_; }
  int max_length() const { return kv_.max_blocks * kBlockTokens; }
  void grow() { ++length_; }
  int prompt_length() const { return prompt_length_; }
  // Tokens at the start that the client gave; the rest of a resumed prompt is output already.
  int num_prompt() const { return prompt_length_ - num_generated_; }
  // The sequence as a batch of one.
  const predictor::DecodeBatch& alone() const { return alone_; }
  kernels::FetchList* fetches_alone() const { return fetches_alone_; }
  // One of its KV heads as a sequence of one head (kernels/one_head.h); device.
  const kernels::SequenceKv* head_alone(int kv_head) const { return heads_alone_ + kv_head; }
  const kernels::SequenceKv& kv() const { return kv_; }
  const kernels::FetchList& fetches() const { return fetches_; }
  const predictor::PolicyState& policy_state() const { return *policy_state_; }
  kvstore::Reservation& reservation() { return reservation_; }
  // Null where the arena holds all of the sequence's KV.
  kvstore::OutsizedKv* outsized() const { return reservation_.outsized.get(); }
  // Copies its fetch lists to where host_fetches() reads them, when the stream has passed.
  void copy_fetches(kernels::Stream& stream);
  std::span<const kernels::FetchEntry> host_fetches(int layer, int kv_head) const;
  // True where the policy attends all blocks and not all of them have slots: attention then streams
  // the others from the arena.
  bool streams_all() const { return streams_all_; }
  // Of a policy that spills: true until spill(). Every block has a slot, nothing is chosen.
  bool is_dense() const { return is_dense_; }
  // Whether the prompt is done, and its first token drawn or being drawn.
  bool decodes() const { return length_ > prompt_length_; }
  bool keeps_sketches() const { return kv_.sketches != nullptr; }

  // What the prompt's attention covers, in history columns; [1], device.
  const std::int32_t* prompt_columns() const { return prompt_columns_; }

  // Marks the prompt's blocks resident, block b in slot b, if there is a slot for each; prefill
  // then writes them there. Nothing to do, and to wait for, unless the sequence has spilled.
  void make_prompt_resident(kernels::Stream& stream);
  // Gives up the slots beyond the budget's. The local window stays, since a part of it may not be
  // in the arena yet; a sequence that doesn't decode yet keeps nothing. What else it shall have is
  // up to the next resolve(). REQUIRES: is_dense(), nothing of it is in flight; `scratch` has room
  // for kLocalBlocks blocks a layer and KV head.
  void spill(const predictor::Policy& policy, const kernels::DeviceBuffer& scratch,
             kernels::Stream& stream);
  // After use(): slab addresses to the device.
  void upload_slabs(kernels::Stream& stream);
  // The token that the request demands next; < 0 where it demands none.
  TokenId next_forced() const;
  // With what the device has counted. REQUIRES: nothing of the sequence is in flight.
  KvReport final_report(kernels::Stream& stream);
  // Device bytes: slots (with their block maxima), tables, history, sketches.
  std::int64_t device_bytes() const;

  const SamplingParams sampling;
  const std::vector<TokenId> forced_ids;
  int reused_tokens = 0;
  std::int64_t decode_steps = 0;
  KvReport report;
  // Of its last audit, [num_layers, num_kv_heads]: attention mass that the choice kept; 1 before.
  std::vector<float> recalls;

 private:
  void allocate_slots(const predictor::Policy& policy, int num_slots);
  void allocate_tables(const std::vector<TokenId>& prompt, kernels::Stream& stream);
  bool has_slots_for_prompt() const;
  void upload_slot_tables(int first_block, int num_blocks, kernels::Stream& stream);

  const SequenceId id_;
  const int prompt_length_;
  const int num_generated_;
  int length_;
  kernels::Device& device_;
  kvstore::Reservation reservation_;
  std::unique_ptr<predictor::PolicyState> policy_state_;
  bool streams_all_ = false;
  bool is_dense_ = false;
  bool prompt_is_resident_ = false;  // as make_prompt_resident() has it
  kernels::SequenceKv kv_{};
  kernels::FetchList fetches_{};
  // fetches_' entries and counts, once they were copied.
  std::unique_ptr<PinnedArray<kernels::FetchEntry>> host_entries_;
  std::unique_ptr<PinnedArray<std::int32_t>> host_counts_;
  predictor::DecodeBatch alone_;
  kernels::FetchList* fetches_alone_ = nullptr;
  kernels::SequenceKv* heads_alone_ = nullptr;  // [num_kv_heads]
  const std::int32_t* prompt_columns_ = nullptr;
  kernels::DeviceBuffer slots_;  // and behind them, where they are observed, their block maxima
  kernels::DeviceBuffer tables_;
  kernels::DeviceBuffer sketches_;
};

// Device bytes that a sequence of max_tokens takes.
struct SequenceBytes {
  std::size_t kv_slots = 0;  // with their block maxima
  std::size_t tables = 0;
  std::size_t history = 0;
  std::size_t sketches = 0;
  std::size_t all_blocks = 0;  // in place of kv_slots while it is dense
  std::size_t total() const { return kv_slots + tables + history + sketches; }
};
SequenceBytes sequence_bytes(const kernels::KvShape& shape, const predictor::Policy& policy,
                             int max_tokens);

}  // namespace foretoken::worker
