// TestService: a coordinator process on a tiny model, and fake ranks, in a folder of their own.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/client.h"
#include "common/service_config.h"

namespace foretoken::coordinator {

// A child that ends with its owner. Its stdout is read by lines.
class ChildProcess {
 public:
  explicit ChildProcess(const std::vector<std::string>& arguments);
  ~ChildProcess();  // SIGKILL
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  void signal(int number) const;
  std::string read_line();  // of stdout; empty at its end
  int wait();               // exit code; 128 + signal
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = 0;
  int output_ = -1;
  bool ended_ = false;
};

class TestService {
 public:
  // config.model is filled in.
  explicit TestService(ServiceConfig config = {});
  ~TestService();

  void start_ranks(int step_ms = 0);
  std::unique_ptr<client::Client> connect(std::optional<ClientKeys> keys) const;
  std::unique_ptr<client::Client> connect() const;  // with client.key, where there is one
  // Waits until the status says so.
  void wait_until_ready(client::Client& client) const;

  const std::string& endpoint() const { return endpoint_; }
  const std::filesystem::path& folder() const { return folder_; }
  ChildProcess& coordinator() { return *coordinator_; }
  std::vector<std::unique_ptr<ChildProcess>>& ranks() { return ranks_; }

 private:
  ServiceConfig config_;
  std::filesystem::path folder_;
  std::string endpoint_;
  std::string worker_endpoint_;
  std::unique_ptr<ChildProcess> coordinator_;
  std::vector<std::unique_ptr<ChildProcess>> ranks_;
};

}  // namespace foretoken::coordinator
