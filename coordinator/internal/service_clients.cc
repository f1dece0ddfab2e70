// Service, its clients' side: requests come in, are checked, and become Request objects.
#include <algorithm>

#include "common/log.h"
#include "common/wire.h"
#include "coordinator/request_check.h"
#include "coordinator/service.h"

namespace foretoken::coordinator {
namespace {

// Longer texts are tokenized elsewhere: 1 MiB takes about 100 ms.
constexpr std::size_t kShortText = 8192;
// Of long texts that wait for that, memory that clients fill: of all, some 6 s of work, and of one
// tenant, so that others have their turns.
constexpr std::size_t kMostText = std::size_t{64} << 20;
constexpr std::size_t kMostTextOfTenant = std::size_t{16} << 20;
// Ids of a prompt that are decoded whatever the context: 65,536 take 1 ms.
constexpr std::size_t kMostIds = 65536;

}  // namespace

void Service::on_client_frame(const RouterFrame& frame, TimePoint now) {
  // What is not much too long is told how long it is.
  const auto most = std::max(kMostIds, 4 * static_cast<std::size_t>(context()));
  auto request = decode_client_request(frame.body, most);
  if (!request) {
    const std::string id(peek_request_id(frame.body));
    return reject(frame.peer, sessions_.find(frame.peer, id) ? "" : id, request.error(), now);
  }
  std::visit([&](auto& message) { on_request(frame, std::move(message), now); }, *request);
  pump(now);
}

void Service::reject(const std::string& peer, const std::string& request_id, const Error& error,
                     TimePoint now) {
  metrics_.on_rejected(error.code);
  // A name that is too long is what is wrong with it, and costs memory until it is read.
  const bool is_name = request_id.size() <= kMaxRequestIdBytes;
  sessions_.send(peer,
                 ErrorMessage{is_name ? request_id : "", std::string(error_code_name(error.code)),
                              error.message},
                 now);
}

std::int64_t Service::context() const {
  auto least = parts_.model.context;
  for (const auto& group : groups_) {
    if (group->ranks.is_ready()) least = std::min(least, group->ranks.context());
  }
  return least;
}

Status Service::check_admission(const RouterFrame& frame, const GenerateRequest& wish) const {
  if (drain_until_) {
    return Error{ErrorCode::kUnavailable, "the service is draining and takes no new requests"};
  }
  FT_RETURN_IF_ERROR(check_request(wish, parts_.model.vocab_size));
  if (wish.prompt && !parts_.model.tokenizer) {
    return Error{ErrorCode::kInvalidArgument,
                 "the model folder has no tokenizer.json; give prompt_ids in place of prompt"};
  }
  if (wish.prompt_ids) {
    FT_ASSIGN_OR_RETURN(const int tokens,
                        check_length(wish.prompt_ids->size(), wish.max_tokens, context()));
    static_cast<void>(tokens);
  }
  const auto& config = parts_.config;
  const auto not_running = requests_.size() - by_sequence_.size();
  if (not_running >= static_cast<std::size_t>(config.max_waiting)) {
    return Error{ErrorCode::kExhausted, std::to_string(not_running) +
                                            " requests wait already (--max-waiting); try again "
                                            "later"};
  }
  if (wish.prompt && wish.prompt->size() > kShortText && parts_.tokenize_later != nullptr) {
    const auto waiting =
        parts_.tokenize_later->waiting_bytes(Request::tenant_of(frame.peer, frame.client_key));
    if (waiting.of_tenant + wish.prompt->size() > kMostTextOfTenant ||
        waiting.all + wish.prompt->size() > kMostText) {
      return Error{ErrorCode::kExhausted, std::to_string(waiting.all >> 20) +
                                              " MiB of text wait to be tokenized already, " +
                                              std::to_string(waiting.of_tenant >> 20) +
                                              " of them this client's; try again later"};
    }
  }
  const bool limited = parts_.operator_key.empty() || frame.client_key != parts_.operator_key;
  if (limited && sessions_.count(frame.peer, frame.client_key) >=
                     static_cast<std::size_t>(config.max_requests_per_client)) {
    return Error{ErrorCode::kExhausted,
                 "this client has " + std::to_string(config.max_requests_per_client) +
                     " requests running or waiting (--max-requests-per-client); wait for one"};
  }
  return Ok{};
}

void Service::on_request(const RouterFrame& frame, GenerateRequest wish, TimePoint now) {
  if (sessions_.find(frame.peer, wish.request_id)) {
    return reject(
        frame.peer, "",
        {ErrorCode::kInvalidArgument, "request_id: this connection has a request of that name"},
        now);
  }
  if (const auto status = check_admission(frame, wish); !status) {
    return reject(frame.peer, wish.request_id, status.error(), now);
  }
  const auto id = RequestId{++last_request_};
  sessions_.attach(frame.peer, frame.client_key, wish.request_id, id);
  auto request = std::make_unique<Request>(Request::Origin{id, frame.peer, frame.client_key, now},
                                           std::move(wish));
  auto& taken = *(requests_[id] = std::move(request));
  if (taken.wish().prompt_ids) return on_tokenized(id, *taken.wish().prompt_ids, now);
  std::string text = taken.take_text();
  const EncodeOptions options{.add_special = taken.wish().add_special_tokens};
  if (parts_.tokenize_later != nullptr && text.size() > kShortText) {
    return parts_.tokenize_later->submit(id, taken.tenant(), std::move(text), options);
  }
  on_tokenized(id, parts_.model.tokenizer->encode(text, options), now);
}

void Service::on_tokenized(RequestId id, Result<std::vector<TokenId>> ids, TimePoint now) {
  auto* request = find(id);
  if (request == nullptr || request->state() != RequestState::kTokenizing) return;  // cancelled
  if (!ids) return fail(*request, ids.error(), now);
  const auto max_tokens = check_length(ids->size(), request->wish().max_tokens, context());
  if (!max_tokens) return fail(*request, max_tokens.error(), now);
  request->set_prompt(*std::move(ids), *max_tokens, parts_.model.tokenizer);
  waiting_.insert(id);
  log().debug("request {}: {} tokens, at most {} more", raw(id), request->prompt().size(),
              *max_tokens);
  pump(now);
}

void Service::on_request(const RouterFrame& frame, const CancelRequest& message, TimePoint now) {
  // A request that is unknown has ended meanwhile, or is not this connection's.
  if (const auto id = sessions_.find(frame.peer, message.request_id)) cancel(*find(*id), now);
}

void Service::on_request(const RouterFrame& frame, const StatusRequest&, TimePoint now) {
  sessions_.send(frame.peer, status(frame.peer, now), now);
}

void Service::on_request(const RouterFrame& frame, const ModelsRequest&, TimePoint now) {
  sessions_.send(frame.peer, ModelsReply{{parts_.model.name}, context()}, now);
}

void Service::on_request(const RouterFrame& frame, const DrainRequest&, TimePoint now) {
  if (frame.client_key != parts_.operator_key) {
    return reject(
        frame.peer, "",
        {ErrorCode::kInvalidArgument, "only the operator's key (client.key) may drain the service"},
        now);
  }
  sessions_.send(frame.peer, DrainReply{}, now);
  drain(now);
}

StatusReply Service::status(const std::string& peer, TimePoint now) const {
  StatusReply reply;
  reply.model = parts_.model.name;
  reply.device = parts_.config.device;
  reply.tensor_parallel_size = parts_.config.tensor_parallel_size;
  reply.max_model_len = context();
  reply.requests_waiting = static_cast<std::int64_t>(waiting_.size());
  reply.requests_running = static_cast<std::int64_t>(requests_.size() - waiting_.size());
  reply.requests_of_client = static_cast<std::int64_t>(sessions_.requests_of(peer).size());
  reply.worker_restarts = restarts_;
  reply.uptime_s = std::chrono::duration<double>(now - started_at_).count();
  bool any_ready = false;
  bool failed = false;
  for (const auto& group : groups_) {
    const auto& ranks = group->ranks;
    if (ranks.is_ready()) {
      any_ready = true;
      reply.device = ranks.capacity().device;
      continue;
    }
    if (!reply.detail.empty()) reply.detail += "; ";
    reply.detail += "group " + std::to_string(ranks.group()) + ": " + ranks.describe();
    if (!group->last_death.empty()) reply.detail += "; before: " + group->last_death;
    failed = failed || (!group->was_ready && !group->last_death.empty());
  }
  if (any_ready) {
    reply.kv_slabs_total = slabs_.total;
    reply.kv_slabs_cached = slabs_.cached;
    reply.kv_slabs_used = slabs_.total - slabs_.free - slabs_.cached;
    reply.kv_nvme = slabs_.nvme;
  }
  reply.state = drain_until_ ? "draining" : any_ready ? "ready" : failed ? "failed" : "loading";
  return reply;
}

}  // namespace foretoken::coordinator
