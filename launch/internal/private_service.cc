#include "launch/internal/private_service.h"

#include <signal.h>

#include "launch/internal/config_sources.h"
#include "launch/internal/endpoint_file.h"
#include "launch/internal/service_flags.h"

namespace foretoken::launch {
namespace {

constexpr std::chrono::milliseconds kPollInterval{20};
constexpr std::chrono::seconds kStopTimeout{15};

Command serve_command(ServiceConfig config, const std::filesystem::path& folder) {
  config.zmq_endpoint = "ipc://" + (folder / "api.sock").string();
  Command command{.name = "the private service",
                  .argv = {"/proc/self/exe", "serve", config.model, "--quiet",
                           "--runtime-dir=" + folder.string(),
                           "--endpoint-file=" + (folder / "endpoint.json").string()},
                  .parent_death_signal = SIGTERM};
  for (const std::string& flag : to_flags(config)) command.argv.push_back(flag);
  // The flags say it all: what the environment said is in them.
  for (const ServiceFlag& flag : service_flags()) {
    command.unset.push_back(environment_name(flag.field));
  }
  if (!process_environment()("FORETOKEN_LOG")) {
    command.environment.emplace_back("FORETOKEN_LOG", "warn");
  }
  return command;
}

}  // namespace

PrivateService::PrivateService(const ServiceConfig& config,
                               const std::function<bool()>& interrupted)
    : serve_(std::make_unique<Process>(serve_command(config, folder_.path()))) {
  const auto endpoint_path = folder_.path() / "endpoint.json";
  while (!std::filesystem::exists(endpoint_path)) {
    if (interrupted()) throw Exception(ErrorCode::kCancelled, "interrupted");
    if (const auto ended = serve_->wait(kPollInterval)) {
      throw Exception(ended->error_code(), "the service did not start");
    }
  }
  const EndpointFile endpoint = read_endpoint_file(endpoint_path).value_or_throw();
  connection_.endpoint = endpoint.endpoint;
  if (!endpoint.key_file.empty()) {
    connection_.keys = read_client_keys(endpoint.key_file).value_or_throw();
  }
}

PrivateService::~PrivateService() {
  serve_->signal(SIGTERM);
  if (!serve_->wait(kStopTimeout)) serve_->signal(SIGKILL);
}

client::ClientConfig PrivateService::connection() const { return connection_; }

}  // namespace foretoken::launch
