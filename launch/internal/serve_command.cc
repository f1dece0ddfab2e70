// foretoken serve: a service in the foreground.
#include <algorithm>

#include "common/available_memory.h"
#include "common/model_config.h"
#include "common/private_folder.h"
#include "common/safetensors.h"
#include "launch/internal/cli.h"
#include "launch/internal/files.h"
#include "launch/internal/machine.h"
#include "launch/internal/supervisor.h"

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;

struct ServeOptions {
  std::string model;
  ServiceOptions service;
  std::string launcher = "mpirun";
  std::string runtime_dir;
  std::string endpoint_file;
  bool quiet = false;
};

constexpr double kGib = 1 << 30;
constexpr double kMostDefaultHostGib = 64;

// Fills in what 0 stands for, and checks what one machine can tell before anything is started.
ServiceConfig resolve(ServiceConfig config) {
  config.model = find_model(config.model).value_or_throw();
  const ModelConfig model = read_model_config(config.model).value_or_throw();
  if (config.load_format != "dummy") ModelWeights::open(config.model).value_or_throw();
  if (config.tensor_parallel_size > model.num_heads) {
    throw Exception(ErrorCode::kConfig, "--tensor-parallel-size " +
                                            std::to_string(config.tensor_parallel_size) +
                                            " is more than the model's " +
                                            std::to_string(model.num_heads) + " query heads");
  }
  if (config.threads_per_rank == 0) {
    const int ranks = config.tensor_parallel_size * config.num_groups;
    config.threads_per_rank = std::max(1, num_usable_cores() / ranks);
  }
  if (config.kv_host_gib == 0) {
    config.kv_host_gib =
        std::min(kMostDefaultHostGib, static_cast<double>(host_memory()) / kGib / 4);
  }
  return config;
}

// The user's folder is kept, with its keys; one of our own is removed at the end.
fs::path make_runtime_folder(const std::string& given) {
  const fs::path folder = (fs::absolute(given) / "").parent_path();  // without slashes at its end
  std::error_code error;
  fs::create_directories(folder.parent_path(), error);
  if (error) {
    throw Exception(ErrorCode::kIo, "can't use --runtime-dir " + given + ": " + error.message());
  }
  require_private_folder(folder);
  return folder;
}

int serve(const ServeOptions& options) {
  SupervisorConfig config;
  config.service = resolve(options.service.find(options.model).config);
  config.launcher = options.launcher == "srun" ? Launcher::kSrun : Launcher::kMpirun;
  config.endpoint_file = options.endpoint_file;
  config.quiet = options.quiet;
  std::unique_ptr<RuntimeFolder> own_folder;
  if (options.runtime_dir.empty()) {
    if (config.service.kv_persist) {
      throw Exception(
          ErrorCode::kConfig,
          "--kv-persist needs --runtime-dir: prefixes belong to a service's keys, which "
          "are new at each start without one");
    }
    own_folder = std::make_unique<RuntimeFolder>();
    config.files.folder = own_folder->path();
  } else {
    config.files.folder = make_runtime_folder(options.runtime_dir);
  }
  return Supervisor(std::move(config)).run();
}

}  // namespace

void add_serve_command(CLI::App& app, Action& action) {
  auto options = std::make_shared<ServeOptions>();
  CLI::App* serve_app = app.add_subcommand("serve", "Serve a model until SIGTERM or Ctrl-C");
  serve_app->add_option("MODEL", options->model, "Model folder, or a name of `model list`");
  serve_app->add_option("--launcher", options->launcher, "What starts the ranks")
      ->type_name("mpirun|srun")
      ->check(CLI::IsMember({"mpirun", "srun"}))
      ->group("Processes");
  serve_app
      ->add_option("--runtime-dir", options->runtime_dir,
                   "Folder for sockets and keys (default: a temporary one)")
      ->type_name("DIR")
      ->group("Processes");
  serve_app
      ->add_option("--endpoint-file", options->endpoint_file,
                   "Where to write endpoint, key file and process id as JSON once ready")
      ->type_name("F")
      ->group("Processes");
  serve_app->add_flag("--quiet", options->quiet, "No progress and no ready line")
      ->group("Processes");
  options->service.add_to(*serve_app);
  serve_app->callback([options, &action] { action = [options] { return serve(*options); }; });
}

}  // namespace foretoken::launch
