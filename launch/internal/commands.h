// How the service's programs are started: one function a program.
#pragma once

#include "common/service_config.h"
#include "launch/internal/process.h"
#include "launch/internal/service_files.h"

namespace foretoken::launch {

enum class Launcher { kMpirun, kSrun };

Command kvstore_command(const ServiceConfig& config, const ServiceFiles& files);
Command coordinator_command(const ServiceFiles& files);
struct GroupLife {
  int group = 0;
  int life = 0;  // 1: its first start
};
Command worker_group_command(const ServiceConfig& config, const ServiceFiles& files,
                             const GroupLife& which, Launcher launcher);

}  // namespace foretoken::launch
