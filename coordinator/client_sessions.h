// ClientSessions: the connections that have something going on: which requests are theirs, and what
// waits because they read slowly.
//
// A session's queue holds at most kMaxQueueBytes of small replies and the frame that found the
// socket full, which takes as many messages as a connection may have requests. Tokens don't queue
// here: a request keeps them, and hands them over when can_send() says so. A client that takes
// nothing for kSlowAfter, or whose connection is closed, is lost. One whose requests make no tokens
// for a while gets an empty token message every kKeepAlive, which is how a closed connection shows.
//
// For one thread. Example: tests/coordinator/client_sessions_test.cc
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/messages.h"
#include "coordinator/outbox.h"
#include "coordinator/worker_group.h"

namespace foretoken::coordinator {

class ClientSessions {
 public:
  static constexpr std::size_t kMaxQueueBytes = std::size_t{256} << 10;
  static constexpr std::chrono::seconds kSlowAfter{30};
  static constexpr std::chrono::milliseconds kKeepAlive{500};

  explicit ClientSessions(Outbox& outbox) : outbox_(outbox) {}

  // A request belongs to a connection from attach() to detach().
  // REQUIRES: find() gives nothing.
  void attach(const std::string& peer, const std::string& tenant, const std::string& request_id,
              RequestId id);
  void detach(const std::string& peer, const std::string& request_id);
  std::optional<RequestId> find(const std::string& peer, const std::string& request_id) const;
  std::vector<RequestId> requests_of(const std::string& peer) const;
  // Of a connection; or of all connections of a tenant, unless that is empty.
  std::size_t count(const std::string& peer, const std::string& tenant) const;

  // Whether a frame would leave at once. Then send() it.
  bool can_send(const std::string& peer) const;
  void send(const std::string& peer, const ServerMessage& message, TimePoint now);
  // Whether all has left that will.
  bool is_empty() const;

  // Sends what waits. Returns the connections that are lost since the last call; they are
  // forgotten.
  std::vector<std::string> on_time(TimePoint now);

 private:
  struct Held {
    RequestId id{};
    std::string tenant;
  };
  struct Session {
    std::map<std::string, Held> requests;
    std::deque<std::string> queue;
    std::size_t queue_bytes = 0;
    std::optional<TimePoint> blocked_since;
    TimePoint last_sent;
    bool lost = false;
  };
  void transmit(const std::string& peer, Session& session, std::string frame, TimePoint now);
  void flush(const std::string& peer, Session& session, TimePoint now);

  Outbox& outbox_;
  std::map<std::string, Session> sessions_;
  std::map<std::string, std::size_t> requests_of_tenant_;
};

}  // namespace foretoken::coordinator
