#include "launch/internal/commands.h"

#include <signal.h>
#include <unistd.h>

#include <cstdint>

#include "launch/internal/files.h"

namespace foretoken::launch {
namespace {

std::vector<std::string> launcher_words(Launcher launcher, int ranks) {
  const std::string count = std::to_string(ranks);
  if (launcher == Launcher::kSrun) return {"srun", "--mpi=pmix", "--ntasks=" + count};
  // Threads are bound by the rank itself; a node with fewer cores than ranks still runs them.
  return {"mpirun", "--bind-to", "none", "--oversubscribe", "-n", count};
}

std::string bytes_of(double gib) {
  return std::to_string(static_cast<std::int64_t>(gib * (1 << 30)));
}

}  // namespace

Command kvstore_command(const ServiceConfig& config, const ServiceFiles& files) {
  Command command{.name = "kvstore",
                  .argv = {sibling_program("foretoken-kvstore").string(),
                           "--socket=" + files.store_socket().string(),
                           "--arena-bytes=" + bytes_of(config.kv_host_gib)}};
  if (config.kv_nvme_path.empty()) return command;
  command.argv.push_back("--nvme-path=" + config.kv_nvme_path);
  if (config.kv_nvme_gib > 0)
    command.argv.push_back("--nvme-bytes=" + bytes_of(config.kv_nvme_gib));
  if (config.kv_nvme_reuse != "auto")
    command.argv.push_back("--nvme-reuse=" + config.kv_nvme_reuse);
  if (config.kv_persist) {
    command.argv.emplace_back("--persist");
  } else {
    command.parent_death_signal = SIGTERM;  // it removes its file
  }
  if (config.kv_encrypt) command.argv.emplace_back("--encrypt");
  if (!config.kv_key_file.empty()) command.argv.push_back("--key-file=" + config.kv_key_file);
  return command;
}

Command coordinator_command(const ServiceFiles& files) {
  return {.name = "coordinator",
          .argv = {sibling_program("foretoken-coordinator").string(),
                   "--config=" + files.config().string(), "--runtime-dir=" + files.folder.string(),
                   "--store-socket=" + files.store_socket().string()},
          .capture_output = true};
}

Command worker_group_command(const ServiceConfig& config, const ServiceFiles& files,
                             const GroupLife& which, Launcher launcher) {
  Command command{.name = "worker group " + std::to_string(which.group),
                  .argv = launcher_words(launcher, config.tensor_parallel_size)};
  for (const std::string& word :
       {sibling_program("foretoken-worker").string(), std::string("--coordinator"),
        files.worker_endpoint(), std::string("--group"), std::to_string(which.group),
        std::string("--life"), std::to_string(which.life)}) {
    command.argv.push_back(word);
  }
  // libgomp would spin for 5 ms after each parallel region otherwise.
  command.environment = {{"OMP_WAIT_POLICY", "passive"}};
  if (geteuid() == 0) {
    command.environment.emplace_back("OMPI_ALLOW_RUN_AS_ROOT", "1");
    command.environment.emplace_back("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
  }
  return command;
}

}  // namespace foretoken::launch
