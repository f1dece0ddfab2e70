#include "common/socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <mutex>
#include <zmq.hpp>

#include "common/check.h"
#include "common/internal/zap.h"

namespace foretoken {
namespace {

constexpr int kHandshakeMs = 5000;
constexpr int kHeartbeatMs = 5000;          // finds half-open connections ...
constexpr int kHeartbeatTimeoutMs = 30000;  // ... and leaves a slow client its 30 s
constexpr int kQueuedMessages = 1000;       // a peer, each way
constexpr int kBacklog = 1024;

void set_common(zmq::socket_t& socket, const std::string& endpoint, std::size_t max_frame_bytes) {
  socket.set(zmq::sockopt::linger, 0);
  socket.set(zmq::sockopt::sndhwm, kQueuedMessages);
  socket.set(zmq::sockopt::rcvhwm, kQueuedMessages);
  socket.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(max_frame_bytes));
  socket.set(zmq::sockopt::handshake_ivl, kHandshakeMs);
  if (endpoint.starts_with("tcp:")) {
    socket.set(zmq::sockopt::heartbeat_ivl, kHeartbeatMs);
    socket.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
    socket.set(zmq::sockopt::tcp_keepalive, 1);
  }
}

Error socket_error(const std::string& verb, const std::string& endpoint,
                   const zmq::error_t& error) {
  if (error.num() == EADDRINUSE) {
    return {ErrorCode::kPortInUse,
            "can't " + verb + " " + endpoint + ": the address is in use; choose another --port"};
  }
  return {ErrorCode::kConfig, "can't " + verb + " " + endpoint + ": " + error.what()};
}

// Whether a process listens at an ipc endpoint. libzmq would remove its socket and take its place.
bool is_listened_at(const std::string& endpoint) {
  const std::string path = endpoint.substr(std::strlen("ipc://"));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return false;  // bind() says so
  path.copy(address.sun_path, path.size());
  const int probe = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool listens =
      ::connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  ::close(probe);
  return listens;
}

// Receives one message of any number of parts; nullopt when none waits.
std::optional<std::vector<zmq::message_t>> receive_parts(zmq::socket_t& socket) {
  std::vector<zmq::message_t> parts;
  do {
    if (!socket.recv(parts.emplace_back(), zmq::recv_flags::dontwait)) return std::nullopt;
  } while (parts.back().more());
  return parts;
}

}  // namespace

// ---- context ---------------------------------------------------------------------------------

class SocketContext {
 public:
  ~SocketContext() {
    context_.shutdown();
    zap_.reset();
  }
  zmq::context_t& get() { return context_; }

  // Lets these keys connect to a new domain, and names it.
  std::string make_domain(const std::vector<std::string>& public_keys) {
    const std::lock_guard lock(mutex_);
    if (!zap_) zap_ = std::make_unique<internal::ZapHandler>(context_);
    const auto domain = "foretoken-" + std::to_string(++num_domains_);
    zap_->allow(domain, public_keys);
    return domain;
  }

  std::string make_monitor_endpoint() {
    const std::lock_guard lock(mutex_);
    return "inproc://monitor-" + std::to_string(++num_monitors_);
  }

 private:
  zmq::context_t context_;
  std::mutex mutex_;
  std::unique_ptr<internal::ZapHandler> zap_;  // guarded by mutex_
  int num_domains_ = 0;                        // guarded by mutex_
  int num_monitors_ = 0;                       // guarded by mutex_
};

std::shared_ptr<SocketContext> make_socket_context() { return std::make_shared<SocketContext>(); }

// ---- router ----------------------------------------------------------------------------------

struct RouterSocket::Impl {
  std::shared_ptr<SocketContext> context;
  zmq::socket_t socket;
  std::string endpoint;
};

RouterSocket::RouterSocket(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
RouterSocket::~RouterSocket() = default;
const std::string& RouterSocket::endpoint() const { return impl_->endpoint; }

Result<std::unique_ptr<RouterSocket>> RouterSocket::bind(std::shared_ptr<SocketContext> context,
                                                         const Config& config) {
  try {
    auto impl = std::make_unique<Impl>();
    impl->context = std::move(context);
    impl->socket = zmq::socket_t(impl->context->get(), zmq::socket_type::router);
    auto& socket = impl->socket;
    set_common(socket, config.endpoint, config.max_frame_bytes);
    socket.set(zmq::sockopt::sndhwm, config.max_queued);
    socket.set(zmq::sockopt::rcvhwm, config.max_received);
    socket.set(zmq::sockopt::router_mandatory, true);
    socket.set(zmq::sockopt::linger, static_cast<int>(config.linger.count()));
    socket.set(zmq::sockopt::backlog, kBacklog);
    if (config.endpoint.starts_with("ipc://")) {
      if (is_listened_at(config.endpoint)) {
        return Error{ErrorCode::kPortInUse, "can't bind " + config.endpoint +
                                                ": another process listens there; end it, or "
                                                "choose another path"};
      }
      // Only this user's processes; zmq.hpp has no name for this option.
      const auto uid = ::geteuid();
      zmq_setsockopt(socket.handle(), ZMQ_IPC_FILTER_UID, &uid, sizeof uid);
    }
    if (config.server_keys) {
      socket.set(zmq::sockopt::curve_server, true);
      socket.set(zmq::sockopt::curve_publickey, config.server_keys->public_key);
      socket.set(zmq::sockopt::curve_secretkey, config.server_keys->secret_key);
      socket.set(zmq::sockopt::zap_domain, impl->context->make_domain(config.allowed_clients));
    }
    socket.bind(config.endpoint);
    impl->endpoint = socket.get(zmq::sockopt::last_endpoint);
    return std::unique_ptr<RouterSocket>(new RouterSocket(std::move(impl)));
  } catch (const zmq::error_t& error) {
    return socket_error("bind", config.endpoint, error);
  }
}

std::optional<RouterFrame> RouterSocket::receive() {
  const auto parts = receive_parts(impl_->socket);
  if (!parts) return std::nullopt;
  RouterFrame frame;
  frame.peer = parts->front().to_string();
  // A message has one part after the routing id. Any other is given on as an empty frame, which
  // no decoder accepts, so that its sender hears of it.
  if (parts->size() == 2) frame.body = parts->back().to_string();
  if (const char* user = zmq_msg_gets(const_cast<zmq_msg_t*>(parts->back().handle()), "User-Id")) {
    frame.client_key = user;
  }
  return frame;
}

Status RouterSocket::send(const std::string& peer, std::string_view body) {
  try {
    // Whether the peer can take a message shows at its first part.
    const auto first =
        impl_->socket.send(zmq::buffer(peer), zmq::send_flags::sndmore | zmq::send_flags::dontwait);
    if (!first) return Error{ErrorCode::kExhausted, "the peer's queue is full"};
    const auto second = impl_->socket.send(zmq::buffer(body), zmq::send_flags::dontwait);
    if (!second) return Error{ErrorCode::kExhausted, "the peer's queue is full"};
    return Ok{};
  } catch (const zmq::error_t& error) {
    if (error.num() == EHOSTUNREACH) return Error{ErrorCode::kNotFound, "the peer is gone"};
    return Error{ErrorCode::kIo, std::string("can't send: ") + error.what()};
  }
}

void wait_readable(std::span<RouterSocket* const> sockets, std::span<const int> fds,
                   std::chrono::milliseconds timeout) {
  std::vector<zmq::pollitem_t> items;
  for (auto* socket : sockets) items.push_back({socket->impl_->socket.handle(), 0, ZMQ_POLLIN, 0});
  for (const int fd : fds) items.push_back({nullptr, fd, ZMQ_POLLIN, 0});
  // A signal ends the wait early (EINTR), as a message would: the caller looks at everything.
  zmq_poll(items.data(), static_cast<int>(items.size()), static_cast<long>(timeout.count()));
}

// ---- dealer ----------------------------------------------------------------------------------

namespace {

// Reads a socket's monitor: whether a connection that was made has been lost.
class LossWatch {
 public:
  // REQUIRES: `socket` isn't connected yet, and lives longer.
  LossWatch(SocketContext& context, zmq::socket_t& socket)
      : socket_(socket), events_(context.get(), zmq::socket_type::pair) {
    const auto endpoint = context.make_monitor_endpoint();
    const int kinds = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED;
    if (zmq_socket_monitor(socket.handle(), endpoint.c_str(), kinds) != 0) throw zmq::error_t();
    // Unbounded: ZeroMQ's thread would stand still where nobody reads for long, and close() too.
    events_.set(zmq::sockopt::rcvhwm, 0);
    events_.set(zmq::sockopt::linger, 0);
    events_.connect(endpoint);
  }
  // From here on no event is sent: to a reader that is gone, ZeroMQ's thread would wait for ever.
  ~LossWatch() { zmq_socket_monitor(socket_.handle(), nullptr, 0); }
  LossWatch(const LossWatch&) = delete;
  LossWatch& operator=(const LossWatch&) = delete;

  zmq::socket_t& events() { return events_; }

  bool was_lost() {
    while (const auto parts = receive_parts(events_)) {
      std::uint16_t event = 0;  // zmq_socket_monitor(3): then its value, and a part for the address
      std::memcpy(&event, parts->front().data(), sizeof event);
      if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) was_made_ = true;
      if (event == ZMQ_EVENT_DISCONNECTED) was_lost_ |= was_made_;
    }
    return was_lost_;
  }

 private:
  zmq::socket_t& socket_;
  zmq::socket_t events_;
  bool was_made_ = false;
  bool was_lost_ = false;
};

}  // namespace

struct DealerSocket::Impl {
  std::shared_ptr<SocketContext> context;
  zmq::socket_t socket;
  std::optional<LossWatch> watch;  // ends before the socket
};

DealerSocket::DealerSocket(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DealerSocket::~DealerSocket() = default;
int DealerSocket::fd() const { return impl_->socket.get(zmq::sockopt::fd); }

Result<std::unique_ptr<DealerSocket>> DealerSocket::connect(std::shared_ptr<SocketContext> context,
                                                            const Config& config) {
  try {
    auto impl = std::make_unique<Impl>();
    impl->context = std::move(context);
    impl->socket = zmq::socket_t(impl->context->get(), zmq::socket_type::dealer);
    auto& socket = impl->socket;
    set_common(socket, config.endpoint, config.max_frame_bytes);
    if (config.keys) {
      socket.set(zmq::sockopt::curve_serverkey, config.keys->server_public_key);
      socket.set(zmq::sockopt::curve_publickey, config.keys->own.public_key);
      socket.set(zmq::sockopt::curve_secretkey, config.keys->own.secret_key);
    }
    if (config.watches_connection) impl->watch.emplace(*impl->context, socket);
    socket.connect(config.endpoint);
    return std::unique_ptr<DealerSocket>(new DealerSocket(std::move(impl)));
  } catch (const zmq::error_t& error) {
    return socket_error("connect to", config.endpoint, error);
  }
}

std::optional<std::string> DealerSocket::receive(std::chrono::milliseconds timeout) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + timeout;
  std::vector<zmq::pollitem_t> items = {{impl_->socket.handle(), 0, ZMQ_POLLIN, 0}};
  if (impl_->watch) items.push_back({impl_->watch->events().handle(), 0, ZMQ_POLLIN, 0});
  while (true) {
    if (auto parts = receive_parts(impl_->socket)) return parts->back().to_string();
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
    if (left <= 0 || (impl_->watch && was_lost())) return std::nullopt;
    zmq_poll(items.data(), static_cast<int>(items.size()), static_cast<long>(left));
  }
}

bool DealerSocket::was_lost() {
  FT_CHECK(impl_->watch.has_value());
  return impl_->watch->was_lost();
}

Status DealerSocket::send(std::string_view body) {
  try {
    if (impl_->socket.send(zmq::buffer(body), zmq::send_flags::dontwait)) return Ok{};
    return Error{ErrorCode::kExhausted, "1,000 messages wait to be sent: the peer takes none"};
  } catch (const zmq::error_t& error) {
    return Error{ErrorCode::kIo, std::string("can't send: ") + error.what()};
  }
}

}  // namespace foretoken
