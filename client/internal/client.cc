#include "client/client.h"

#include <algorithm>
#include <deque>
#include <iterator>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "common/wire.h"

namespace foretoken::client {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr milliseconds kPingEvery{1000};
constexpr milliseconds kCallEvery{200};  // who waits for tokens may want to cancel

Error error_of(const ErrorMessage& message) {
  return {error_code_from_name(message.code).value_or(ErrorCode::kInternal), message.message};
}

// Connections are apart anyway; the random part keeps a log of several clients readable.
std::string name_prefix() {
  std::random_device device;
  char text[16];
  std::snprintf(text, sizeof text, "c%08x-", device());
  return text;
}

// Empty where it is of none.
std::string request_of(const ServerMessage& message) {
  return std::visit(
      [](const auto& m) -> std::string {
        if constexpr (requires { m.request_id; }) return m.request_id;
        return "";
      },
      message);
}

}  // namespace

struct Client::Impl {
  ClientConfig config;
  std::unique_ptr<DealerSocket> socket;
  const std::string prefix = name_prefix();
  std::uint64_t last_name = 0;
  std::set<std::string> open;  // requests whose last message has not come
  // The same, when the status was asked for that is still awaited: one at a time.
  std::optional<std::set<std::string>> open_at_ping;
  std::deque<ServerMessage> messages;  // of requests, not yet handed out
  Clock::time_point heard = Clock::now();

  Error gone() const {
    return {ErrorCode::kUnavailable, "no answer from " + config.endpoint + " within " +
                                         std::to_string(config.silence_timeout.count()) +
                                         " ms; is the service running, and does it know this key?"};
  }

  Status send(const ClientRequest& request) { return socket->send(encode(request)); }

  Status connect() {
    FT_ASSIGN_OR_RETURN(socket,
                        DealerSocket::connect(make_socket_context(), {.endpoint = config.endpoint,
                                                                      .keys = config.keys,
                                                                      .watches_connection = true}));
    return Ok{};
  }

  // The service cancels what a connection that is lost has asked for, so this is the end of all
  // open requests. The new socket has nothing of them that would still be sent.
  Status lose_connection() {
    for (const auto& name : open) {
      messages.push_back(ErrorMessage{
          name, std::string(error_code_name(ErrorCode::kUnavailable)),
          "the connection to " + config.endpoint + " was lost, and the request with it"});
    }
    open.clear();
    open_at_ping.reset();
    return connect();
  }

  // Before something is sent, which a connection that is lost would lose too.
  Status have_connection() {
    while (socket->was_lost()) {
      FT_ASSIGN_OR_RETURN(auto message, next(Clock::now()));
      if (message) keep(*std::move(message));
    }
    return Ok{};
  }

  // The next message of any kind; nullopt at `end`, or earlier where the connection was lost.
  Result<std::optional<ServerMessage>> next(Clock::time_point end) {
    const auto left = std::chrono::ceil<milliseconds>(end - Clock::now());
    auto frame = socket->receive(std::max(left, milliseconds(0)));
    if (!frame && socket->was_lost()) {
      frame = socket->receive(milliseconds(0));  // what came before the loss
      if (!frame) FT_RETURN_IF_ERROR(lose_connection());
    }
    if (!frame) return std::optional<ServerMessage>();
    heard = Clock::now();
    FT_ASSIGN_OR_RETURN(auto message, decode_server_message(*frame));
    return std::optional<ServerMessage>(std::move(message));
  }

  // Asks after a second of silence whether the service is there, while requests are open.
  Status stay_in_touch() {
    const auto now = Clock::now();
    if (now - heard >= config.silence_timeout) {
      open_at_ping.reset();  // the next request asks anew
      return gone();
    }
    if (now - heard < kPingEvery || open_at_ping) return Ok{};
    open_at_ping = open;
    return send(StatusRequest{});
  }

  // Keeps a message of a request for receive(). Those of requests that are over are dropped: a
  // cancelled one's may still be on their way.
  void keep(ServerMessage message) {
    auto name = request_of(message);
    auto* error = std::get_if<ErrorMessage>(&message);
    if (error != nullptr && name.empty() && open.size() == 1) {
      error->request_id = name = *open.begin();  // it was no message to the service at all
    }
    if (!open.contains(name)) return;
    if (const auto* token = std::get_if<TokenMessage>(&message)) {
      if (token->tokens.empty() && token->text.empty()) return;  // it lives, nothing more
    } else {
      open.erase(name);
    }
    messages.push_back(std::move(message));
  }

  // A status reply comes behind all that was sent before it: requests that were open when it was
  // asked for, still are here, and are unknown there, were lost with the service that took them.
  Status check_known(const StatusReply& status) {
    const auto asked_for =
        std::exchange(open_at_ping, std::nullopt).value_or(std::set<std::string>());
    const auto still =
        std::ranges::count_if(asked_for, [this](const auto& name) { return open.contains(name); });
    if (still <= status.requests_of_client) return Ok{};
    open.clear();
    return Error{ErrorCode::kUnavailable,
                 "the service at " + config.endpoint + " was restarted and lost the request"};
  }

  // Waits for the one answer to a question that is no request.
  template <typename Reply>
  Result<Reply> ask(const ClientRequest& question) {
    open_at_ping.reset();  // its answer may be taken for this one's
    FT_RETURN_IF_ERROR(have_connection());
    FT_RETURN_IF_ERROR(send(question));
    const auto end = Clock::now() + config.silence_timeout;
    while (true) {
      FT_ASSIGN_OR_RETURN(auto message, next(end));
      if (!message && Clock::now() < end) {
        return Error{ErrorCode::kUnavailable,
                     "the connection to " + config.endpoint + " was lost before an answer came"};
      }
      if (!message) return gone();
      if (auto* reply = std::get_if<Reply>(&*message)) return std::move(*reply);
      const auto* error = std::get_if<ErrorMessage>(&*message);
      if (error != nullptr && error->request_id.empty()) return error_of(*error);
      keep(*std::move(message));
    }
  }
};

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

Result<std::unique_ptr<Client>> Client::connect(const ClientConfig& config) {
  auto impl = std::make_unique<Impl>();
  impl->config = config;
  FT_RETURN_IF_ERROR(impl->connect());
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

Result<std::string> Client::submit(GenerateRequest request) {
  if (request.request_id.empty()) {
    request.request_id = impl_->prefix + std::to_string(++impl_->last_name);
  }
  auto name = request.request_id;
  if (impl_->open.contains(name)) {
    return Error{ErrorCode::kInvalidArgument, "request_id " + name + " is in use"};
  }
  const auto frame = encode(ClientRequest(std::move(request)));
  if (frame.size() > kMaxFrameBytes) {
    return Error{ErrorCode::kInvalidArgument, "the request has " + std::to_string(frame.size()) +
                                                  " bytes; the service takes " +
                                                  std::to_string(kMaxFrameBytes)};
  }
  FT_RETURN_IF_ERROR(impl_->have_connection());
  // The service owes an answer from now on, not from when this client last spoke with it.
  if (impl_->open.empty()) impl_->heard = Clock::now();
  FT_RETURN_IF_ERROR(impl_->socket->send(frame));
  impl_->open.insert(name);
  return name;
}

Result<ServerMessage> Client::receive(milliseconds timeout) {
  const auto end = Clock::now() + timeout;
  while (true) {
    if (!impl_->messages.empty()) {
      auto message = std::move(impl_->messages.front());
      impl_->messages.pop_front();
      return message;
    }
    FT_ASSIGN_OR_RETURN(auto message, impl_->next(std::min(end, Clock::now() + kPingEvery)));
    if (message) {
      if (const auto* status = std::get_if<StatusReply>(&*message)) {
        FT_RETURN_IF_ERROR(impl_->check_known(*status));
      } else {
        impl_->keep(*std::move(message));
      }
    } else {
      // Also where the time given is short: a caller may come again and again.
      if (!impl_->open.empty()) FT_RETURN_IF_ERROR(impl_->stay_in_touch());
      if (Clock::now() >= end) {
        return Error{ErrorCode::kTimeout, "no message within the time given"};
      }
    }
  }
}

Result<DoneMessage> Client::generate(GenerateRequest request, const OnTokens& on_tokens) {
  const auto begin = Clock::now();
  const auto& patience = impl_->config.request_timeout;
  // Messages of requests that were submitted are for receive().
  struct Others {
    ~Others() {
      keeper.insert(keeper.begin(), std::move_iterator(messages.begin()),
                    std::move_iterator(messages.end()));
    }
    std::deque<ServerMessage>& keeper;
    std::vector<ServerMessage> messages = {};
  } others{impl_->messages};
  FT_ASSIGN_OR_RETURN(const auto name, submit(std::move(request)));
  bool cancelled = false;
  while (true) {
    Result<ServerMessage> message = receive(kCallEvery);
    const bool is_done = message && std::holds_alternative<DoneMessage>(*message);
    if (patience && Clock::now() - begin >= *patience && !is_done) {
      message = Error{ErrorCode::kTimeout, "the request took longer than the client waits for it"};
    } else if (!message && message.error().code == ErrorCode::kTimeout) {
      message = ServerMessage(TokenMessage{name, {}, {}});
    }
    if (!message) {
      static_cast<void>(cancel(name));
      impl_->open.erase(name);
      return message.error();
    }
    if (request_of(*message) != name) {
      others.messages.push_back(*std::move(message));
      continue;
    }
    if (auto* done = std::get_if<DoneMessage>(&*message)) return std::move(*done);
    if (const auto* error = std::get_if<ErrorMessage>(&*message)) return error_of(*error);
    const auto* token = std::get_if<TokenMessage>(&*message);
    if (token == nullptr || !on_tokens) continue;
    const bool cancels = on_tokens(*token) == StreamAction::kCancel;
    if (cancels && !std::exchange(cancelled, true)) FT_RETURN_IF_ERROR(cancel(name));
  }
}

Status Client::cancel(const std::string& request_id) {
  return impl_->send(CancelRequest{request_id});
}

Result<StatusReply> Client::status() { return impl_->ask<StatusReply>(StatusRequest{}); }
Result<ModelsReply> Client::models() { return impl_->ask<ModelsReply>(ModelsRequest{}); }

Status Client::drain() {
  FT_ASSIGN_OR_RETURN(const auto reply, impl_->ask<DrainReply>(DrainRequest{}));
  static_cast<void>(reply);
  return Ok{};
}

}  // namespace foretoken::client
