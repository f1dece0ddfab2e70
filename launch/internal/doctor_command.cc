// foretoken doctor: what this machine lacks, and the fix. Exit code 1 when something fails.
#include <spdlog/fmt/fmt.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "common/service_config.h"
#include "launch/internal/cli.h"
#include "launch/internal/doctor.h"

namespace foretoken::launch {
namespace {

struct DoctorOptions {
  int port = ServiceConfig{}.port;
  bool strict = false;
  bool json = false;
};

void print(const std::vector<Finding>& findings, bool json) {
  auto list = nlohmann::ordered_json::array();
  for (const Finding& finding : findings) {
    if (json) {
      list.push_back({{"health", name_of(finding.health)},
                      {"what", finding.what},
                      {"found", finding.found},
                      {"fix", finding.fix}});
      continue;
    }
    std::cout << fmt::format("{:<5} {:<15} {}\n", name_of(finding.health), finding.what,
                             finding.found);
    if (!finding.fix.empty()) std::cout << fmt::format("{:<21} fix: {}\n", "", finding.fix);
  }
  if (json) std::cout << list.dump() << "\n";
}

int doctor(const DoctorOptions& options) {
  const std::vector<Finding> findings = examine_machine(options.port);
  print(findings, options.json);
  for (const Finding& finding : findings) {
    if (finding.health == Health::kFail) return 1;
    if (finding.health == Health::kWarn && options.strict) return 1;
  }
  return 0;
}

}  // namespace

void add_doctor_command(CLI::App& app, Action& action) {
  auto options = std::make_shared<DoctorOptions>();
  CLI::App* doctor_app =
      app.add_subcommand("doctor", "Check this machine; each line says ok, warn or fail");
  doctor_app->add_flag("--strict", options->strict, "Warnings count as failures");
  doctor_app->add_flag("--json", options->json, "Print a JSON list");
  doctor_app->add_option("--port", options->port, "The port a service would bind")
      ->type_name("N")
      ->capture_default_str();
  doctor_app->callback([options, &action] { action = [options] { return doctor(*options); }; });
}

}  // namespace foretoken::launch
