// foretoken-coordinator: one a service. Takes clients' requests, plans every step of the worker
// groups, and streams the tokens back. Started by `foretoken serve`, or by hand:
//   foretoken-coordinator --config FILE --runtime-dir DIR --store-socket PATH
#include <signal.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "common/log.h"
#include "common/program.h"
#include "coordinator/server.h"

namespace {

using foretoken::ErrorCode;
using foretoken::Exception;
using foretoken::coordinator::Server;
using foretoken::coordinator::ServerConfig;

constexpr int kNice = 10;  // on a CPU node, ranks go first

foretoken::ServiceConfig read_config(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) throw Exception(ErrorCode::kConfig, "can't read --config " + path);
  auto config = foretoken::service_config_from_json(text.str()).value_or_throw();
  static_cast<void>(foretoken::validate(config).value_or_throw());
  return config;
}

// Each connection takes one: clients' must not leave ranks without.
void raise_open_files() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const rlim_t before = std::exchange(limit.rlim_cur, limit.rlim_max);
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
    foretoken::log().warn("open files stay at {}: {}", before, std::strerror(errno));
  }
}

// Before any thread starts, so that all inherit it.
void block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

void serve(ServerConfig config, const std::string& config_path) {
  config.service = read_config(config_path);
  if (config.service.kv_encrypt) foretoken::forbid_core_dumps();
  const bool has_gpu = std::filesystem::exists("/dev/nvidiactl");
  if (config.service.device == "cpu" || (config.service.device == "auto" && !has_gpu)) {
    setpriority(PRIO_PROCESS, 0, kNice);
  }
  block_signals();
  raise_open_files();
  Server(std::move(config)).run();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Takes clients' requests and plans every step of the worker groups",
               "foretoken-coordinator"};
  ServerConfig config;
  std::string config_path;
  app.add_option("--config", config_path, "The service's configuration: a JSON file")->required();
  app.add_option("--runtime-dir", config.runtime_dir, "Folder of keys and sockets")->required();
  app.add_option("--store-socket", config.store_socket, "Socket of the node's KV store")
      ->required();
  app.add_option("--worker-endpoint", config.worker_endpoint,
                 "Where ranks connect; ipc://RUNTIME_DIR/worker.sock by default");
  return foretoken::run_program(app, argc, argv, "coordinator",
                                [&] { serve(std::move(config), config_path); });
}
