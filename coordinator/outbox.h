// Outbox: where the service's words go. The server's is made of sockets, a test's of lists.
#pragma once

#include <string>
#include <string_view>

#include "common/result.h"

namespace foretoken::coordinator {

class Outbox {
 public:
  virtual ~Outbox() = default;
  // Neither blocks. Errors: kExhausted when the peer's queue is full, kNotFound when it is gone.
  virtual Status to_client(const std::string& peer, std::string_view frame) = 0;
  virtual Status to_worker(const std::string& peer, std::string_view frame) = 0;
  // One JSON object for the process that started this one.
  virtual void to_parent(const std::string& line) = 0;
};

}  // namespace foretoken::coordinator
