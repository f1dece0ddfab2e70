// PrivateService: a whole service for one command, on ipc sockets in a folder of its own:
// `foretoken serve` as a child, which ends with us whatever happens.
#pragma once

#include <chrono>
#include <memory>

#include "client/client.h"
#include "common/service_config.h"
#include "launch/internal/files.h"
#include "launch/internal/process.h"

namespace foretoken::launch {

class PrivateService {
 public:
  // Returns once it is ready. Throws Exception with the code that `serve` ended with, after that
  // has said why on stderr; kCancelled when interrupted() turned true meanwhile.
  PrivateService(const ServiceConfig& config, const std::function<bool()>& interrupted);
  // Stops it; the children are gone afterwards.
  ~PrivateService();

  client::ClientConfig connection() const;

 private:
  RuntimeFolder folder_;
  std::unique_ptr<Process> serve_;
  client::ClientConfig connection_;
};

}  // namespace foretoken::launch
