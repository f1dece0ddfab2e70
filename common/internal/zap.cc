#include "common/internal/zap.h"

#include <pthread.h>

#include <array>

#include "common/log.h"

namespace foretoken::internal {
namespace {

// Parts of a ZAP request, in their order.
enum Part { kVersion, kRequest, kDomain, kAddress, kIdentity, kMechanism, kCredentials, kParts };

std::string z85(const std::string& key) {
  std::array<char, 41> text{};
  zmq_z85_encode(text.data(), reinterpret_cast<const std::uint8_t*>(key.data()), key.size());
  return text.data();
}

}  // namespace

ZapHandler::ZapHandler(zmq::context_t& context) : socket_(context, zmq::socket_type::rep) {
  socket_.set(zmq::sockopt::linger, 0);
  socket_.bind("inproc://zeromq.zap.01");
  thread_ = std::thread([this] { serve(); });
}

ZapHandler::~ZapHandler() { thread_.join(); }

void ZapHandler::allow(const std::string& domain, const std::vector<std::string>& public_keys) {
  const std::lock_guard lock(mutex_);
  allowed_[domain] = {public_keys.begin(), public_keys.end()};
}

void ZapHandler::serve() {
  pthread_setname_np(pthread_self(), "zap");
  try {
    while (true) {
      std::vector<std::string> request;
      zmq::message_t part;
      do {
        if (!socket_.recv(part)) continue;
        request.push_back(part.to_string());
      } while (part.more());
      answer(request);
    }
  } catch (const zmq::error_t& error) {
    if (error.num() != ETERM) log().error("the ZAP handler ended: {}", error.what());
  }
  socket_.close();
}

bool ZapHandler::known(const std::string& domain, const std::string& public_key) {
  const std::lock_guard lock(mutex_);
  const auto found = allowed_.find(domain);
  return found != allowed_.end() && found->second.contains(public_key);
}

void ZapHandler::answer(const std::vector<std::string>& request) {
  bool allowed = false;
  std::string user;
  if (request.size() > kMechanism && request[kVersion] == "1.0") {
    if (request[kMechanism] == "NULL") {
      allowed = request[kDomain].empty();  // a socket without keys asks, too
    } else if (request[kMechanism] == "CURVE" && request.size() == kParts &&
               request[kCredentials].size() == 32) {
      user = z85(request[kCredentials]);
      allowed = known(request[kDomain], user);
    }
  }
  const std::array<std::string, 6> reply = {"1.0",
                                            request.size() > kRequest ? request[kRequest] : "",
                                            allowed ? "200" : "400",
                                            allowed ? "OK" : "unknown key",
                                            user,
                                            ""};
  for (std::size_t i = 0; i < reply.size(); ++i) {
    const auto flags = i + 1 < reply.size() ? zmq::send_flags::sndmore : zmq::send_flags::none;
    socket_.send(zmq::buffer(reply[i]), flags);
  }
}

}  // namespace foretoken::internal
