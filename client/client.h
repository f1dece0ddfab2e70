// Client: one connection to a Foretoken service (the coordinator's ROUTER), in C++.
//
//   auto client = client::Client::connect({.endpoint = "tcp://127.0.0.1:8000", .keys = keys});
//   GenerateRequest request;
//   request.prompt = "Once upon a time";
//   auto done = (*client)->generate(request, [](const TokenMessage& message) {
//     std::cout << message.text << std::flush;
//     return client::StreamAction::kContinue;
//   });
//
// generate() runs one request to its end. submit() and receive() carry many at once over one
// connection. The service bounds a request's life. Where the connection ends, as it does at once
// when the service dies, all requests end with kUnavailable: the service cancels what it asked for.
// The client connects again by itself, and serves new requests. While it waits it asks for the
// status after a second of silence, so that a service that is out of reach, or forgot the request,
// shows as kUnavailable within seconds and not at the end of the request's time.
//
// Owns its socket. Not thread-safe: a client belongs to one thread; threads that generate at once
// take a client each. Example: tests/client/client_test.cc
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "common/messages.h"
#include "common/result.h"
#include "common/socket.h"

namespace foretoken::client {

enum class StreamAction { kContinue, kCancel };

// Called for each token message of a streamed request, and several times a second with an empty one
// while none comes, on the thread that called generate().
using OnTokens = std::function<StreamAction(const TokenMessage&)>;

struct ClientConfig {
  std::string endpoint = {};            // tcp://HOST:PORT or ipc://PATH
  std::optional<ClientKeys> keys = {};  // of a service that runs with keys: read_client_keys(FILE)
  // How long the service may be silent before it counts as gone.
  std::chrono::milliseconds silence_timeout{10000};
  // How long one generate() may take in all; none: as long as the service allows.
  std::optional<std::chrono::milliseconds> request_timeout = {};
};

class Client {
 public:
  // Connects in the background: an absent service shows at the first call, as kUnavailable.
  // Error: kConfig for an endpoint that can't be parsed.
  static Result<std::unique_ptr<Client>> connect(const ClientConfig& config);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Runs a request to its end; an empty request_id is filled in. A callback that says kCancel
  // cancels it: the result is then `done` with finish_reason "cancelled" and what came so far.
  // Errors: what the service answered; kUnavailable when it is gone; kTimeout past
  // request_timeout (the request is cancelled then).
  Result<DoneMessage> generate(GenerateRequest request, const OnTokens& on_tokens = {});

  // Sends a request and returns its id at once. Its messages come from receive().
  Result<std::string> submit(GenerateRequest request);

  // The next TokenMessage, DoneMessage or ErrorMessage of any submitted request. Where the
  // connection is lost, each gets an ErrorMessage "unavailable".
  // Errors: kTimeout after `timeout` without one; kUnavailable when the service is silent, or no
  // longer knows the submitted requests.
  Result<ServerMessage> receive(std::chrono::milliseconds timeout);

  // Asks for the end of a request. Its last message still comes.
  Status cancel(const std::string& request_id);

  // Errors of these: kUnavailable without an answer within silence_timeout, or the service's own.
  Result<StatusReply> status();
  Result<ModelsReply> models();
  // Tells the service to finish what runs, take nothing new and end. Returns when it has agreed.
  // With keys, only the operator's own (client.key beside the server's) may.
  Status drain();

 private:
  struct Impl;
  explicit Client(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken::client
