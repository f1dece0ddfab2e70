// foretoken status, drain: a word with a running service.
#include <iostream>
#include <nlohmann/json.hpp>

#include "launch/internal/connection.h"

namespace foretoken::launch {
namespace {

struct StatusOptions {
  ConnectOptions connect;
  bool json = false;
};

std::unique_ptr<client::Client> connect_to(const ConnectOptions& options) {
  return client::Client::connect(options.find()).value_or_throw();
}

nlohmann::ordered_json to_json(const KvNvme& nvme) {
  return {{"state", nvme.state},
          {"slabs_total", nvme.slabs_total},
          {"slabs_held", nvme.slabs_held},
          {"slabs_read", nvme.slabs_read},
          {"slabs_written", nvme.slabs_written},
          {"bytes_read", nvme.bytes_read},
          {"bytes_written", nvme.bytes_written},
          {"evictions", nvme.evictions},
          {"dropped", nvme.dropped},
          {"io_errors", nvme.io_errors},
          {"checksum_failures", nvme.checksum_failures},
          {"host_checksum_failures", nvme.host_checksum_failures},
          {"tokens_passed_over", nvme.tokens_passed_over}};
}

int status(const StatusOptions& options) {
  const StatusReply reply = connect_to(options.connect)->status().value_or_throw();
  const nlohmann::ordered_json json = {{"state", reply.state},
                                       {"detail", reply.detail},
                                       {"model", reply.model},
                                       {"device", reply.device},
                                       {"tensor_parallel_size", reply.tensor_parallel_size},
                                       {"max_model_len", reply.max_model_len},
                                       {"requests_running", reply.requests_running},
                                       {"requests_waiting", reply.requests_waiting},
                                       {"kv_slabs_total", reply.kv_slabs_total},
                                       {"kv_slabs_used", reply.kv_slabs_used},
                                       {"kv_slabs_cached", reply.kv_slabs_cached},
                                       {"kv_nvme", to_json(reply.kv_nvme)},
                                       {"worker_restarts", reply.worker_restarts},
                                       {"uptime_s", reply.uptime_s}};
  if (options.json) {
    std::cout << json.dump() << "\n";
    return 0;
  }
  for (const auto& [key, value] : json.items()) {
    std::cout << key << ": " << (value.is_string() ? value.get<std::string>() : value.dump())
              << "\n";
  }
  return 0;
}

CLI::App* add_one(CLI::App& app, const std::string& name, const std::string& about,
                  ConnectOptions& connect) {
  CLI::App* added = app.add_subcommand(name, about);
  connect.add_to(*added);
  added->get_option("--connect")->required();
  return added;
}

}  // namespace

void add_service_commands(CLI::App& app, Action& action) {
  auto status_options = std::make_shared<StatusOptions>();
  CLI::App* status_app =
      add_one(app, "status", "What a running service is doing", status_options->connect);
  status_app->add_flag("--json", status_options->json, "Print one JSON object");
  status_app->callback(
      [status_options, &action] { action = [status_options] { return status(*status_options); }; });

  auto connect = std::make_shared<ConnectOptions>();
  CLI::App* drain_app =
      add_one(app, "drain", "Let a running service finish what it has, and end", *connect);
  drain_app->callback([connect, &action] {
    action = [connect] {
      const Status drained = connect_to(*connect)->drain();
      if (!drained) throw Exception(drained.error());
      return 0;
    };
  });
}

}  // namespace foretoken::launch
