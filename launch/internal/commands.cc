#include "launch/internal/commands.h"

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

}  // namespace

Command kvstore_command(const ServiceConfig& config, const ServiceFiles& files) {
  const auto arena_bytes = static_cast<std::int64_t>(config.kv_host_gib * (1 << 30));
  return {.name = "kvstore",
          .argv = {sibling_program("foretoken-kvstore").string(),
                   "--socket=" + files.store_socket().string(),
                   "--arena-bytes=" + std::to_string(arena_bytes)}};
}

Command coordinator_command(const ServiceConfig&, const ServiceFiles& files) {
  return {.name = "coordinator",
          .argv = {sibling_program("foretoken-coordinator").string(),
                   "--config=" + files.config().string(), "--runtime-dir=" + files.folder.string(),
                   "--store-socket=" + files.store_socket().string()},
          .capture_output = true};
}

Command worker_group_command(const ServiceConfig& config, const ServiceFiles& files, int group,
                             Launcher launcher) {
  Command command{.name = "worker group " + std::to_string(group),
                  .argv = launcher_words(launcher, config.tensor_parallel_size)};
  for (const std::string& word :
       {sibling_program("foretoken-worker").string(), std::string("--coordinator"),
        files.worker_endpoint(), std::string("--group"), std::to_string(group)}) {
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
