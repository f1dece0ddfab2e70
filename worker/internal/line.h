// Line: a rank's connection to the coordinator.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "common/socket.h"
#include "common/wire.h"
#include "worker/rank.h"

namespace foretoken::worker {

// Not thread-safe; heartbeats have one of their own. What fails is thrown.
class Line {
 public:
  explicit Line(const RankConfig& config) : context_(make_socket_context()) {
    DealerSocket::Config socket;
    socket.endpoint = config.coordinator;
    if (!config.key_file.empty()) socket.keys = read_client_keys(config.key_file).value_or_throw();
    socket_ = DealerSocket::connect(context_, socket).value_or_throw();
  }
  void send(const WorkerMessage& message) {
    if (const Status status = socket_->send(encode(message)); !status) {
      throw Exception(status.error());
    }
  }
  std::optional<CoordinatorMessage> receive(std::chrono::milliseconds timeout) {
    const std::optional<std::string> frame = socket_->receive(timeout);
    if (!frame) return std::nullopt;
    return decode_coordinator_message(*frame).value_or_throw();
  }

 private:
  std::shared_ptr<SocketContext> context_;
  std::unique_ptr<DealerSocket> socket_;
};

}  // namespace foretoken::worker
