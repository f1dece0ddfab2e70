// Rank: a worker process's life: finds its place by MPI, joins the coordinator, loads its part of
// the model, runs plans until it is told to stop.
#pragma once

#include <chrono>
#include <filesystem>
#include <string>

#include "common/result.h"

namespace foretoken::worker {

struct RankConfig {
  std::string coordinator;         // ZeroMQ endpoint
  std::filesystem::path key_file;  // empty: no CURVE (ipc)
  int group = 0;
  int life = 0;                                  // of the group: Hello::life
  std::chrono::seconds coordinator_timeout{30};  // of silence, before this rank ends by itself
};

// Runs until Shutdown. Throws Exception for whatever ends it otherwise (kUnavailable where the
// coordinator is gone); the coordinator has been told by then. REQUIRES: MPI is initialised.
void run_rank(const RankConfig& config);

}  // namespace foretoken::worker
