#include "coordinator/request.h"

#include <algorithm>

#include "common/check.h"

namespace foretoken::coordinator {
namespace {

bool contains(const std::vector<TokenId>& ids, TokenId id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

double milliseconds_between(std::optional<TimePoint> begin, std::optional<TimePoint> end) {
  if (!begin || !end) return 0;
  return std::chrono::duration<double, std::milli>(*end - *begin).count();
}

double median_ms(std::vector<std::chrono::microseconds> steps) {
  if (steps.empty()) return 0;
  const auto middle = steps.begin() + std::ssize(steps) / 2;
  std::nth_element(steps.begin(), middle, steps.end());
  return std::chrono::duration<double, std::milli>(*middle).count();
}

}  // namespace

Request::Request(Origin origin, GenerateRequest wish)
    : origin_(std::move(origin)), wish_(std::move(wish)) {}

std::string Request::take_text() {
  FT_CHECK(state_ == RequestState::kTokenizing && wish_.prompt.has_value());
  std::string text = *std::move(wish_.prompt);
  wish_.prompt.reset();
  return text;
}

void Request::set_prompt(std::vector<TokenId> ids, int max_tokens,
                         const std::optional<Tokenizer>& tokenizer) {
  FT_CHECK(state_ == RequestState::kTokenizing && max_tokens >= 1 && !ids.empty());
  prompt_ = std::move(ids);
  max_tokens_ = max_tokens;
  text_.emplace(tokenizer, wish_.stop);
  wish_.prompt_ids.reset();
  state_ = RequestState::kWaiting;
}

void Request::run_as(int group, SequenceId sequence) {
  FT_CHECK(state_ == RequestState::kWaiting, static_cast<int>(state_));
  group_ = group;
  sequence_ = sequence;
  state_ = RequestState::kRunning;
}

void Request::on_admitted(std::int64_t reused_tokens, TimePoint now) {
  cached_tokens_ = admitted_at_ ? std::min(cached_tokens_, reused_tokens) : reused_tokens;
  if (!admitted_at_) admitted_at_ = now;
}

void Request::wait_again() {
  FT_CHECK(state_ == RequestState::kRunning, static_cast<int>(state_));
  state_ = RequestState::kWaiting;
}

bool Request::accept(std::int64_t position, const TokenInfo& token,
                     const std::vector<TokenId>& eos_ids, TimePoint now) {
  FT_CHECK(state_ == RequestState::kRunning, static_cast<int>(state_));
  if (position != length()) return false;
  tokens_.push_back(token);
  if (!first_token_at_) first_token_at_ = now;
  last_token_at_ = now;
  if (const auto reason = end_reason(token, eos_ids)) finish(*reason, now);
  return true;
}

std::optional<std::string> Request::end_reason(const TokenInfo& token,
                                               const std::vector<TokenId>& eos_ids) {
  const bool is_eos = !wish_.ignore_eos && contains(eos_ids, token.id);
  if (is_eos || contains(wish_.stop_token_ids, token.id)) return "stop";
  if (text_->push(token.id)) return "stop";
  if (tokens_left() == 0) return "length";
  return std::nullopt;
}

void Request::finish(const std::string& reason, TimePoint now) {
  FT_CHECK(state_ < RequestState::kFinishing, static_cast<int>(state_));
  state_ = RequestState::kFinishing;
  finish_reason_ = reason;
  finished_at_ = now;
  if (text_) text_->finish();
}

std::int64_t Request::length() const {
  return static_cast<std::int64_t>(prompt_.size() + tokens_.size());
}
std::int64_t Request::tokens_left() const {
  return max_tokens_ - static_cast<std::int64_t>(tokens_.size());
}

std::vector<TokenId> Request::sequence_tokens() const {
  auto ids = prompt_;
  for (const auto& token : tokens_) ids.push_back(token.id);
  return ids;
}

AdmitSequence Request::admission(SequenceId sequence) const {
  AdmitSequence admit;
  admit.sequence = sequence;
  admit.prompt = sequence_tokens();
  admit.num_generated = static_cast<std::int64_t>(tokens_.size());
  admit.max_length = length() + tokens_left();
  admit.sampling = wish_.sampling;
  if (wish_.forced_ids.size() > tokens_.size()) {
    admit.forced_ids.assign(wish_.forced_ids.begin() + static_cast<std::ptrdiff_t>(tokens_.size()),
                            wish_.forced_ids.end());
  }
  return admit;
}

bool Request::has_news() const { return told_ < tokens_.size() || (text_ && text_->has_news()); }

TokenMessage Request::take_news() {
  TokenMessage message;
  message.request_id = wish_.request_id;
  message.tokens.assign(tokens_.begin() + static_cast<std::ptrdiff_t>(told_), tokens_.end());
  message.text = text_->take();
  told_ = tokens_.size();
  return message;
}

DoneMessage Request::make_done(KvReport kv) const {
  DoneMessage done;
  done.request_id = wish_.request_id;
  done.finish_reason = finish_reason_;
  done.prompt_ids = prompt_;
  done.tokens = tokens_;
  if (text_) done.text = text_->text();
  done.usage = {static_cast<std::int64_t>(prompt_.size()),
                static_cast<std::int64_t>(tokens_.size()), cached_tokens_};
  done.kv = std::move(kv);
  const auto admitted = admitted_at_ ? admitted_at_ : finished_at_;
  done.timing.queue_ms = milliseconds_between(origin_.arrival, admitted);
  done.timing.prefill_ms = milliseconds_between(admitted_at_, first_token_at_);
  done.timing.decode_ms = milliseconds_between(first_token_at_, last_token_at_);
  done.timing.total_ms = milliseconds_between(origin_.arrival, finished_at_);
  done.timing.step_ms = median_ms(steps_);
  return done;
}

}  // namespace foretoken::coordinator
