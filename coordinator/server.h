// Server: the coordinator as a process: sockets, keys, signals and the clock around a Service.
// One thread runs the loop; ZeroMQ, the tokenizer of long prompts and the metrics have their own.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "common/service_config.h"
#include "common/socket.h"
#include "coordinator/key_folder.h"
#include "coordinator/metrics.h"
#include "coordinator/service.h"
#include "coordinator/tokenize_thread.h"

namespace foretoken::coordinator {

struct ServerConfig {
  ServiceConfig service;
  std::filesystem::path runtime_dir;  // keys, and the ranks' socket; 0700
  std::string store_socket;           // the node's KV store, told to the ranks
  std::string worker_endpoint;        // empty: ipc://RUNTIME_DIR/worker.sock
};

// A client endpoint over tcp has CURVE keys, unless --insecure-bind; over ipc the folder's mode and
// the kernel's word on the peer's user guard it.
class Server : public Outbox {
 public:
  // Binds and loads. Throws Exception. Signals: SIGTERM and SIGINT must be blocked already.
  explicit Server(ServerConfig config);
  ~Server() override;

  // Runs until it is drained, or a second signal comes. Writes events for its parent to stdout, one
  // JSON object a line: {"event":"listening","endpoint":...,"worker_endpoint":...} at once,
  // {"event":"group_dead","group":...,"life":...,"epoch":...,"reason":...} for a group that ends by
  // itself, {"event":"restart_group","group":...,"life":...,"epoch":...,"reason":...} for one that
  // must be killed and started anew, {"event":"draining"} once nothing new is taken. Without
  // "life": of a group of which no rank has come since its last end.
  void run();

 private:
  Status to_client(const std::string& peer, std::string_view frame) override;
  Status to_worker(const std::string& peer, std::string_view frame) override;
  void to_parent(const std::string& line) override;

  void bind(const std::optional<ServiceKeys>& keys);
  bool read_sockets();
  void read_signals();

  const ServerConfig config_;
  int signal_fd_ = -1;
  int signals_ = 0;
  std::shared_ptr<SocketContext> context_;
  std::unique_ptr<RouterSocket> clients_;
  std::unique_ptr<RouterSocket> workers_;
  std::unique_ptr<TokenizeThread> tokenizer_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<Service> service_;
};

}  // namespace foretoken::coordinator
