// ZapHandler: decides which CURVE keys may connect (https://rfc.zeromq.org/spec/27). One a
// context; each server socket with keys is a domain with its own list. Sockets without keys have
// no domain and let everybody in. All else is denied: other mechanisms, malformed requests.
//
// Owns one thread, which ends when the context is shut down. Thread-safe.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>
#include <zmq.hpp>

namespace foretoken::internal {

class ZapHandler {
 public:
  explicit ZapHandler(zmq::context_t& context);
  // REQUIRES: the context was shut down.
  ~ZapHandler();

  void allow(const std::string& domain, const std::vector<std::string>& public_keys);

 private:
  void serve();
  bool known(const std::string& domain, const std::string& public_key);
  void answer(const std::vector<std::string>& request);

  zmq::socket_t socket_;  // used by thread_ only, once it runs
  std::mutex mutex_;
  std::map<std::string, std::set<std::string>> allowed_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace foretoken::internal
