// Socket: one ZeroMQ socket with the settings that every Foretoken socket has: CURVE where keys
// are given, no linger, bounded queues and frames, a handshake deadline, ROUTER_MANDATORY.
//
// Not thread-safe: a socket belongs to one thread. Example: tests/common/socket_test.cc
#pragma once

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken {

// A CURVE key pair, Z85 text. A key file holds public and secret of the server, and the clients
// that may connect; mode 0600.
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
// Writes/reads `path` (0600, created atomically). Error: kConfig when others can read the file.
Status write_client_keys(const std::filesystem::path& path, const ClientKeys& keys);
Result<ClientKeys> read_client_keys(const std::filesystem::path& path);

class SocketContext;  // owns the zmq context and, for servers, the ZAP handler
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
    std::string endpoint;                      // tcp://127.0.0.1:0 picks a port; see endpoint()
    std::optional<KeyPair> server_keys;        // CURVE if given
    std::vector<std::string> allowed_clients;  // public keys; with CURVE only these connect
    std::size_t max_frame_bytes = std::size_t{4} << 20;
  };
  // Error: kPortInUse, kConfig.
  static Result<std::unique_ptr<RouterSocket>> bind(std::shared_ptr<SocketContext> context,
                                                    const Config& config);
  ~RouterSocket();
  const std::string& endpoint() const;
  // File descriptor for poll(); edge-triggered, so drain with receive() until nullopt.
  int fd() const;
  std::optional<RouterFrame> receive();  // nullopt: nothing waits
  // Error: kExhausted when the peer's queue is full, kNotFound when it is gone.
  Status send(const std::string& peer, std::string_view body);

 private:
  struct Impl;
  explicit RouterSocket(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// DEALER: workers' and clients' side. Connects in the background; ZeroMQ reconnects by itself.
class DealerSocket {
 public:
  struct Config {
    std::string endpoint;
    std::optional<ClientKeys> keys;
    std::size_t max_frame_bytes = std::size_t{256} << 20;
  };
  static Result<std::unique_ptr<DealerSocket>> connect(std::shared_ptr<SocketContext> context,
                                                       const Config& config);
  ~DealerSocket();
  int fd() const;
  // nullopt after `timeout` without a message; 0 polls.
  std::optional<std::string> receive(std::chrono::milliseconds timeout);
  Status send(std::string_view body);

 private:
  struct Impl;
  explicit DealerSocket(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken
