#include "coordinator/server.h"

#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/log.h"
#include "common/private_folder.h"
#include "common/wire.h"

namespace foretoken::coordinator {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kIdleTick{200};   // nothing to deliver, only heartbeats to look after
constexpr milliseconds kLinger{1000};    // for last messages
constexpr int kLeastQueue = 16;          // messages to a client that its socket takes
constexpr int kFramesATurn = 256;        // of a socket, before the other has its turn ...
constexpr milliseconds kClientsTurn{2};  // ... and of clients, whose frames may be long
constexpr std::size_t kWorkerFrameBytes = std::size_t{256} << 20;

bool is_tcp(const std::string& endpoint) { return endpoint.starts_with("tcp:"); }

std::string client_endpoint(const ServiceConfig& config) {
  if (!config.zmq_endpoint.empty()) return config.zmq_endpoint;
  return "tcp://" + config.host + ":" + std::to_string(config.port);
}

// ZeroMQ's names of connections begin with a zero byte, then 32 bits that count on from a random
// number. One that a client gave itself may be that of a connection before, whose requests'
// messages it would get; one that begins with a zero byte, as libzmq lets it, it would have to
// guess.
bool is_self_named(const std::string& peer) { return !peer.starts_with('\0'); }

std::string refusal_of_names() {
  return encode(ServerMessage(
      ErrorMessage{"", std::string(error_code_name(ErrorCode::kInvalidArgument)),
                   "this connection names itself; don't set a routing id (ZMQ_ROUTING_ID)"}));
}

int open_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

}  // namespace

Server::Server(ServerConfig config) : config_(std::move(config)), signal_fd_(open_signals()) {
  FT_CHECK(signal_fd_ >= 0);
  require_private_folder(config_.runtime_dir);
  const auto& service = config_.service;
  const bool has_keys = is_tcp(client_endpoint(service)) || is_tcp(config_.worker_endpoint);
  std::optional<ServiceKeys> keys;
  if (has_keys) keys = open_key_folder(config_.runtime_dir).value_or_throw();
  bind(keys);

  auto model = read_served_model(service).value_or_throw();
  metrics_ = std::make_unique<Metrics>(model.name);
  if (service.metrics_port != 0) metrics_->serve(service.metrics_port);
  if (model.tokenizer) tokenizer_ = std::make_unique<TokenizeThread>(*model.tokenizer);
  const bool guarded = keys && is_tcp(client_endpoint(service)) && !service.insecure_bind;
  service_ = std::make_unique<Service>(
      Service::Parts{service, std::move(model), config_.store_socket,
                     keys ? keys->server.secret_key : "",
                     guarded ? keys->client.own.public_key : "", tokenizer_.get()},
      *this, *metrics_, steady_clock::now());
}

Server::~Server() { close(signal_fd_); }

void Server::bind(const std::optional<ServiceKeys>& keys) {
  const auto& service = config_.service;
  context_ = make_socket_context();
  // A step's tokens of all of a connection's requests leave at once; what is more waits where it is
  // counted (ClientSessions).
  RouterSocket::Config clients{.endpoint = client_endpoint(service),
                               .max_queued = std::max(kLeastQueue, service.max_requests_per_client),
                               .max_received = kLeastQueue,  // their frames may have 4 MiB
                               .linger = kLinger};
  if (is_tcp(clients.endpoint)) {
    if (service.insecure_bind) {
      log().warn("--insecure-bind: whoever reaches {} can use this service", clients.endpoint);
    } else {
      clients.server_keys = keys->server;
      clients.allowed_clients = keys->authorized;
      clients.allowed_clients.push_back(keys->client.own.public_key);
    }
  }
  RouterSocket::Config workers{
      .endpoint = config_.worker_endpoint, .max_frame_bytes = kWorkerFrameBytes, .linger = kLinger};
  if (workers.endpoint.empty()) {
    workers.endpoint = "ipc://" + (config_.runtime_dir / "worker.sock").string();
  }
  if (is_tcp(workers.endpoint)) {
    workers.server_keys = keys->server;
    workers.allowed_clients = {keys->worker.own.public_key};
  }
  clients_ = RouterSocket::bind(context_, clients).value_or_throw();
  workers_ = RouterSocket::bind(context_, workers).value_or_throw();
}

void Server::run() {
  log().info("listening at {}, for ranks at {}", clients_->endpoint(), workers_->endpoint());
  to_parent(nlohmann::json{{"event", "listening"},
                           {"endpoint", clients_->endpoint()},
                           {"worker_endpoint", workers_->endpoint()}}
                .dump());
  const std::array<RouterSocket*, 2> sockets = {clients_.get(), workers_.get()};
  std::vector<int> fds = {signal_fd_};
  if (tokenizer_) fds.push_back(tokenizer_->fd());
  auto next_tick = steady_clock::now();
  while (!service_->is_finished() && signals_ < 2) {
    const bool more = read_sockets();
    if (tokenizer_) {
      for (auto& answer : tokenizer_->take()) {
        service_->on_tokenized(answer.id, std::move(answer.ids), steady_clock::now());
      }
    }
    read_signals();
    const auto now = steady_clock::now();
    if (now >= next_tick) {
      service_->on_time(now);
      next_tick = now + (service_->num_requests() == 0 ? kIdleTick : Service::kTick);
    } else if (now >= service_->next_retry()) {
      service_->retry(now);
    }
    if (more) continue;
    const auto next = std::min(next_tick, service_->next_retry());
    const auto left = std::chrono::ceil<milliseconds>(next - steady_clock::now());
    wait_readable(sockets, fds, std::max(left, milliseconds(0)));
  }
  log().info("ended");
}

// True when a socket may have more.
bool Server::read_sockets() {
  bool more = false;
  for (int i = 0; i < kFramesATurn; ++i) {
    const auto frame = workers_->receive();
    if (!frame) break;
    service_->on_worker_frame(*frame, steady_clock::now());
    more = i + 1 == kFramesATurn;
  }
  const auto begin = steady_clock::now();
  for (int i = 0; i < kFramesATurn; ++i) {
    if (steady_clock::now() - begin >= kClientsTurn) return true;
    const auto frame = clients_->receive();
    if (!frame) break;
    more = more || i + 1 == kFramesATurn;
    if (is_self_named(frame->peer)) {
      static_cast<void>(
          to_client(frame->peer, refusal_of_names()));  // whether it reads that or not
    } else {
      service_->on_client_frame(*frame, steady_clock::now());
    }
  }
  return more;
}

void Server::read_signals() {
  signalfd_siginfo info{};
  while (read(signal_fd_, &info, sizeof info) == sizeof info) {
    ++signals_;
    log().info("signal {}: {}", info.ssi_signo, signals_ == 1 ? "draining" : "ending now");
    service_->drain(steady_clock::now());
  }
}

Status Server::to_client(const std::string& peer, std::string_view frame) {
  return clients_->send(peer, frame);
}
Status Server::to_worker(const std::string& peer, std::string_view frame) {
  return workers_->send(peer, frame);
}
void Server::to_parent(const std::string& line) {
  std::fputs((line + "\n").c_str(), stdout);
  std::fflush(stdout);
}

}  // namespace foretoken::coordinator
