// How a command reaches a service: --connect to a running one, or a private one with --model.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "client/client.h"
#include "launch/internal/cli.h"
#include "launch/internal/private_service.h"

namespace foretoken::launch {

// True once SIGINT or SIGTERM came. The first call installs the handlers.
bool interrupted();

class ConnectOptions {
 public:
  // --connect and --key-file.
  void add_to(CLI::App& app);
  const std::string& endpoint() const { return endpoint_; }
  bool has_key_file() const { return !key_file_.empty(); }
  // Throws Exception.
  client::ClientConfig find() const;

 private:
  std::string endpoint_;
  std::string key_file_;
};

// --model with the flags of a service, or --connect.
class ModelOrConnectOptions {
 public:
  void add_to(CLI::App& app);
  // Throws CLI::ParseError unless exactly one of the two was given, and only flags that go with it.
  // Call in the app's callback.
  void check() const;
  // A connection, and the private service behind it if it is one's own. Throws Exception.
  struct Opened {
    std::unique_ptr<PrivateService> service;
    std::unique_ptr<client::Client> client;
  };
  Opened open() const;
  bool is_private() const { return !model_.empty(); }
  ServiceConfig service_config() const;  // REQUIRES: is_private(). Throws Exception.

 private:
  std::string model_;
  ServiceOptions service_;
  ConnectOptions connect_;
};

}  // namespace foretoken::launch
