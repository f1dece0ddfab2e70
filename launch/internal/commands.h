// How the service's programs are started: one function a program.
#pragma once

#include "common/service_config.h"
#include "launch/internal/process.h"
#include "launch/internal/service_files.h"

namespace foretoken::launch {

enum class Launcher { kMpirun, kSrun };

Command kvstore_command(const ServiceConfig& config, const ServiceFiles& files);
Command coordinator_command(const ServiceConfig& config, const ServiceFiles& files);
Command worker_group_command(const ServiceConfig& config, const ServiceFiles& files, int group,
                             Launcher launcher);

}  // namespace foretoken::launch
