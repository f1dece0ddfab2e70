// Socket: one ZeroMQ socket with the settings that every Foretoken socket has: CURVE where keys
// are given, no linger, bounded queues and frames, a handshake deadline, ROUTER_MANDATORY.
//
// Not thread-safe: a socket belongs to one thread. Example: tests/common/socket_test.cc
#pragma once

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken {

// A CURVE key pair, Z85 text: 40 characters each.
struct KeyPair {
  std::string public_key;
  std::string secret_key;
};
// What a client needs to connect: the server's public key and a pair of its own.
struct ClientKeys {
  std::string server_public_key;
  KeyPair own;
};

KeyPair make_key_pair();
bool is_curve_key(std::string_view text);

// A file that only its owner may read: written under another name, mode 0600, then renamed.
// Reading takes at most 64 KiB. Error: kIo; kConfig when others can read the file or own it.
Status write_private_file(const std::filesystem::path& path, std::string_view contents);
Result<std::string> read_private_file(const std::filesystem::path& path);

// A client's keys as a private file: a JSON object of server_public_key, public_key, secret_key.
Status write_client_keys(const std::filesystem::path& path, const ClientKeys& keys);
Result<ClientKeys> read_client_keys(const std::filesystem::path& path);

// Owns the ZeroMQ context and, once a socket with server keys is bound, the ZAP handler's thread.
// Thread-safe. Lives at least as long as its sockets (they share it).
class SocketContext;
std::shared_ptr<SocketContext> make_socket_context();

struct RouterFrame {
  std::string peer;        // ZeroMQ routing id
  std::string client_key;  // the peer's CURVE public key; empty without CURVE
  std::string body;
};

// ROUTER: the coordinator's side.
class RouterSocket {
 public:
  struct Config {
    std::string endpoint = {};                // tcp://127.0.0.1:0 picks a port; see endpoint()
    std::optional<KeyPair> server_keys = {};  // CURVE if given
    std::vector<std::string> allowed_clients = {};  // public keys; with CURVE only these connect
    std::size_t max_frame_bytes = std::size_t{4} << 20;
    int max_queued = 1000;                // messages to a peer, before send() finds its queue full
    int max_received = 1000;              // ... of a peer that wait for receive(); more wait there
    std::chrono::milliseconds linger{0};  // at the end, for what is still to be sent
  };
  // Error: kPortInUse, kConfig.
  static Result<std::unique_ptr<RouterSocket>> bind(std::shared_ptr<SocketContext> context,
                                                    const Config& config);
  ~RouterSocket();
  const std::string& endpoint() const;
  std::optional<RouterFrame> receive();  // nullopt: nothing waits
  // Never blocks. Error: kExhausted when the peer's queue is full, kNotFound when it is gone.
  Status send(const std::string& peer, std::string_view body);

 private:
  friend void wait_readable(std::span<RouterSocket* const>, std::span<const int>,
                            std::chrono::milliseconds);
  struct Impl;
  explicit RouterSocket(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Returns when a socket has a message, a file descriptor is readable, or `timeout` is over.
void wait_readable(std::span<RouterSocket* const> sockets, std::span<const int> fds,
                   std::chrono::milliseconds timeout);

// DEALER: workers' and clients' side. Connects in the background; ZeroMQ reconnects by itself.
class DealerSocket {
 public:
  struct Config {
    std::string endpoint = {};
    std::optional<ClientKeys> keys = {};
    std::size_t max_frame_bytes = std::size_t{256} << 20;
    bool watches_connection = false;  // for was_lost()
  };
  static Result<std::unique_ptr<DealerSocket>> connect(std::shared_ptr<SocketContext> context,
                                                       const Config& config);
  ~DealerSocket();
  // For poll(). Edge-triggered: call receive(0) until nullopt, and again after each send().
  int fd() const;
  // nullopt after `timeout` without a message, and earlier once the connection was lost; 0 polls.
  std::optional<std::string> receive(std::chrono::milliseconds timeout);
  // Whether a connection that was made, handshake included, has been lost since. It stays so: what
  // was sent may be lost, so take a new socket. All that had come before can be received then.
  // REQUIRES: Config::watches_connection.
  bool was_lost();
  // Never blocks. Error: kExhausted when 1,000 messages wait to be sent.
  Status send(std::string_view body);

 private:
  struct Impl;
  explicit DealerSocket(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken
