#include "coordinator/client_sessions.h"

#include <algorithm>

#include "common/check.h"
#include "common/wire.h"

namespace foretoken::coordinator {

void ClientSessions::attach(const std::string& peer, const std::string& tenant,
                            const std::string& request_id, RequestId id) {
  auto& session = sessions_[peer];
  FT_CHECK(session.requests.emplace(request_id, Held{id, tenant}).second, raw(id));
  ++requests_of_tenant_[tenant];
}

void ClientSessions::detach(const std::string& peer, const std::string& request_id) {
  const auto session = sessions_.find(peer);
  if (session == sessions_.end()) return;
  auto& requests = session->second.requests;
  const auto request = requests.find(request_id);
  if (request == requests.end()) return;
  const auto tenant = requests_of_tenant_.find(request->second.tenant);
  if (--tenant->second == 0) requests_of_tenant_.erase(tenant);
  requests.erase(request);
  if (requests.empty() && session->second.queue.empty()) sessions_.erase(session);
}

std::optional<RequestId> ClientSessions::find(const std::string& peer,
                                              const std::string& request_id) const {
  const auto session = sessions_.find(peer);
  if (session == sessions_.end()) return std::nullopt;
  const auto request = session->second.requests.find(request_id);
  if (request == session->second.requests.end()) return std::nullopt;
  return request->second.id;
}

std::vector<RequestId> ClientSessions::requests_of(const std::string& peer) const {
  std::vector<RequestId> ids;
  const auto session = sessions_.find(peer);
  if (session == sessions_.end()) return ids;
  for (const auto& [name, request] : session->second.requests) ids.push_back(request.id);
  return ids;
}

std::size_t ClientSessions::count(const std::string& peer, const std::string& tenant) const {
  if (!tenant.empty()) {
    const auto found = requests_of_tenant_.find(tenant);
    return found == requests_of_tenant_.end() ? 0 : found->second;
  }
  const auto session = sessions_.find(peer);
  return session == sessions_.end() ? 0 : session->second.requests.size();
}

bool ClientSessions::can_send(const std::string& peer) const {
  const auto session = sessions_.find(peer);
  return session == sessions_.end() || session->second.queue.empty();
}

bool ClientSessions::is_empty() const {
  return std::ranges::all_of(sessions_, [](const auto& session) {
    return session.second.queue.empty() || session.second.lost;
  });
}

void ClientSessions::send(const std::string& peer, const ServerMessage& message, TimePoint now) {
  auto [session, is_new] = sessions_.try_emplace(peer);
  transmit(peer, session->second, encode(message), now);
  const auto& after = session->second;
  if (after.requests.empty() && after.queue.empty()) sessions_.erase(session);
}

void ClientSessions::transmit(const std::string& peer, Session& session, std::string frame,
                              TimePoint now) {
  if (session.lost) return;
  // Small replies may queue up to the limit, behind one frame that may be large.
  if (!session.queue.empty() &&
      session.queue_bytes - session.queue.front().size() + frame.size() > kMaxQueueBytes) {
    session.lost = true;
    return;
  }
  session.queue_bytes += frame.size();
  session.queue.push_back(std::move(frame));
  flush(peer, session, now);
}

void ClientSessions::flush(const std::string& peer, Session& session, TimePoint now) {
  while (!session.queue.empty() && !session.lost) {
    const auto sent = outbox_.to_client(peer, session.queue.front());
    if (!sent && sent.error().code == ErrorCode::kExhausted) {
      if (!session.blocked_since) session.blocked_since = now;
      return;
    }
    session.lost = !sent;
    session.blocked_since.reset();
    session.last_sent = now;
    session.queue_bytes -= session.queue.front().size();
    session.queue.pop_front();
  }
}

std::vector<std::string> ClientSessions::on_time(TimePoint now) {
  std::vector<std::string> lost;
  for (auto at = sessions_.begin(); at != sessions_.end();) {
    auto& [peer, session] = *at;
    flush(peer, session, now);
    const bool slow = session.blocked_since && now - *session.blocked_since >= kSlowAfter;
    const bool quiet = session.queue.empty() && now - session.last_sent >= kKeepAlive;
    if (quiet && !session.requests.empty()) {
      transmit(peer, session, encode(TokenMessage{session.requests.begin()->first, {}, {}}), now);
    }
    if (slow || session.lost) {
      lost.push_back(peer);
      session.queue.clear();
      session.lost = true;
    }
    const bool over = session.requests.empty() && session.queue.empty();
    at = over ? sessions_.erase(at) : std::next(at);
  }
  return lost;
}

}  // namespace foretoken::coordinator
