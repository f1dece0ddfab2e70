// Service, the requests: how they are told of, and the ways in which they end.
#include "common/log.h"
#include "coordinator/service.h"

namespace foretoken::coordinator {

Request* Service::find(RequestId id) {
  const auto found = requests_.find(id);
  return found == requests_.end() ? nullptr : found->second.get();
}

void Service::deliver(Request& request, TimePoint now) {
  const auto& peer = request.origin().peer;
  if (!request.wish().stream || !request.has_news() || !sessions_.can_send(peer)) return;
  sessions_.send(peer, request.take_news(), now);
}

void Service::cancel(Request& request, TimePoint now) {
  if (request.state() >= RequestState::kFinishing) return;  // its last message is on its way
  const bool running = request.state() == RequestState::kRunning;
  waiting_.erase(request.origin().id);
  request.finish("cancelled", now);
  if (running) {
    settle(request, now);
  } else {
    complete(request, {}, now);
  }
}

void Service::settle(Request& request, TimePoint now) {
  if (!release_sequence(request)) complete(request, {}, now);
}

// Lets go of its sequence. False: no rank has heard of it, so nothing comes back.
bool Service::release_sequence(Request& request) {
  auto& group = *groups_[static_cast<std::size_t>(request.group())];
  if (group.scheduler->release(request.sequence())) return true;
  by_sequence_.erase(request.sequence());
  return false;
}

void Service::complete(Request& request, KvReport kv, TimePoint now) {
  const auto& peer = request.origin().peer;
  deliver(request, now);
  if (!sessions_.can_send(peer)) {
    request.report = std::move(kv);
    return;
  }
  kv.policy = parts_.config.kv_policy;
  kv.budget_tokens = parts_.config.kv_budget;
  kv.losses = request.losses;
  auto done = request.make_done(std::move(kv));
  metrics_.on_done(done);
  log().info("request {} done: {}, {} + {} tokens in {:.0f} ms", raw(request.origin().id),
             done.finish_reason, done.usage.prompt_tokens, done.usage.completion_tokens,
             done.timing.total_ms);
  const auto id = request.origin().id;
  sessions_.send(peer, std::move(done), now);
  erase(id);
}

void Service::fail(Request& request, const Error& error, TimePoint now) {
  const auto id = request.origin().id;
  log().info("request {} failed: {}: {}", raw(id), error_code_name(error.code), error.message);
  metrics_.on_failed(error.code);
  if (request.state() == RequestState::kRunning) {
    release_sequence(request);
    by_sequence_.erase(request.sequence());
  }
  sessions_.send(request.origin().peer,
                 ErrorMessage{request.wish().request_id, std::string(error_code_name(error.code)),
                              error.message},
                 now);
  erase(id);
}

void Service::forget_client(const std::string& peer) {
  for (const auto id : sessions_.requests_of(peer)) {
    auto& request = *find(id);
    log().info("request {} cancelled: its client is gone or reads nothing", raw(id));
    metrics_.on_failed(ErrorCode::kCancelled);
    if (request.state() == RequestState::kRunning) release_sequence(request);
    erase(id);
  }
}

void Service::erase(RequestId id) {
  auto& request = *find(id);
  waiting_.erase(id);
  const auto sequence = by_sequence_.find(request.sequence());
  if (sequence != by_sequence_.end() && sequence->second == id) by_sequence_.erase(sequence);
  sessions_.detach(request.origin().peer, request.wish().request_id);
  // Else a client that cancels what it sends would hold up everybody's long prompts.
  if (parts_.tokenize_later != nullptr && request.prompt().empty()) {
    parts_.tokenize_later->cancel(id);
  }
  request.end();
  requests_.erase(id);
}

}  // namespace foretoken::coordinator
