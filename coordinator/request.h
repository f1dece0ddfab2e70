// Request: one request from its arrival to its terminal message. Its token list is the truth: KV
// and worker groups may be lost, and the request goes on from its prompt and the tokens it has.
//
//   kTokenizing -> kWaiting -> kRunning -> kFinishing -> kDone
//                     ^            |
//                     +------------+  no room, or the group died
//
// kRunning: a sequence of a group stands for it (in admission, prefill or decode: Scheduler).
// kFinishing: its tokens are final; the KV report of its release is awaited.
// Any state may end in kDone by an error or because the client is gone.
//
// For one thread.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "common/messages.h"
#include "coordinator/output_text.h"
#include "coordinator/worker_group.h"

namespace foretoken::coordinator {

enum class RequestState { kTokenizing, kWaiting, kRunning, kFinishing, kDone };

class Request {
 public:
  struct Origin {
    RequestId id{};
    std::string peer;    // the client's connection
    std::string tenant;  // its key; empty without keys
    TimePoint arrival;
  };
  Request(Origin origin, GenerateRequest wish);

  // Who shares with others: a key, or without keys a connection.
  const std::string& tenant() const { return tenant_of(origin_.peer, origin_.tenant); }
  // Of a connection, and of its key, if it has one.
  static const std::string& tenant_of(const std::string& peer, const std::string& key) {
    return key.empty() ? peer : key;
  }

  // ---- life ----
  RequestState state() const { return state_; }
  // kTokenizing: its prompt's text, which it no longer keeps.
  std::string take_text();
  // The prompt is known: kTokenizing -> kWaiting. max_tokens is final now, and at least 1.
  void set_prompt(std::vector<TokenId> ids, int max_tokens,
                  const std::optional<Tokenizer>& tokenizer);
  // A group takes it: kWaiting -> kRunning.
  void run_as(int group, SequenceId sequence);
  // May come again, of a later sequence: what one of them computed is not counted as cached.
  void on_admitted(std::int64_t reused_tokens, TimePoint now);
  // Its sequence is gone: kRunning -> kWaiting.
  void wait_again();
  // Takes the next token. False when it is not the next one. May finish the request's tokens.
  bool accept(std::int64_t position, const TokenInfo& token, const std::vector<TokenId>& eos_ids,
              TimePoint now);
  // What the step of a token after the first took.
  void note_step(std::chrono::microseconds took) { steps_.push_back(took); }
  // No more tokens: kRunning -> kFinishing, or from any earlier state when cancelled.
  void finish(const std::string& reason, TimePoint now);
  void end() { state_ = RequestState::kDone; }

  // ---- what a sequence that stands for it is given ----
  std::vector<TokenId> sequence_tokens() const;  // prompt, then what was sampled
  std::int64_t tokens_left() const;
  AdmitSequence admission(SequenceId sequence) const;

  // ---- what its client is given ----
  bool has_news() const;
  TokenMessage take_news();
  DoneMessage make_done(KvReport kv) const;

  const Origin& origin() const { return origin_; }
  const GenerateRequest& wish() const { return wish_; }
  const std::vector<TokenId>& prompt() const { return prompt_; }
  const std::vector<TokenInfo>& tokens() const { return tokens_; }
  std::int64_t length() const;
  int group() const { return group_; }
  SequenceId sequence() const { return sequence_; }
  std::optional<TimePoint> last_token_at() const { return last_token_at_; }

  // Kept here for the service.
  std::vector<PrefixKey> segment_keys;     // of sequence_tokens(), as far as they were needed
  std::size_t segments_given = 0;          // of them, with its sequence's prompt
  std::optional<KvReport> report;          // kFinishing: nothing is awaited but the client's queue
  int deaths = 0;                          // of groups that it ran on
  int losses = 0;                          // of its KV, by bytes that failed their check
  bool was_refused = false;                // there was no room for it beside others
  int refusals = 0;                        // admissions that failed though nothing else ran
  TimePoint tried_at{};                    // its last admission
  std::optional<TimePoint> pending_since;  // its prefix comes from NVMe
  std::optional<TimePoint> retry_at;       // of such a one

 private:
  std::optional<std::string> end_reason(const TokenInfo& token,
                                        const std::vector<TokenId>& eos_ids);

  const Origin origin_;
  GenerateRequest wish_;
  RequestState state_ = RequestState::kTokenizing;
  std::vector<TokenId> prompt_;
  std::int64_t max_tokens_ = 0;
  std::vector<TokenInfo> tokens_;
  std::vector<std::chrono::microseconds> steps_;
  std::size_t told_ = 0;  // tokens that the client was told of
  std::optional<OutputText> text_;
  std::string finish_reason_;
  int group_ = 0;
  SequenceId sequence_{};
  std::int64_t cached_tokens_ = 0;
  std::optional<TimePoint> admitted_at_;
  std::optional<TimePoint> first_token_at_;
  std::optional<TimePoint> last_token_at_;
  std::optional<TimePoint> finished_at_;
};

}  // namespace foretoken::coordinator
