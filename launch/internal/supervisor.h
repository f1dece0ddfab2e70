// Supervisor: the only parent of a service's processes. Starts store, coordinator and worker
// groups, restarts a group that died, and ends them all: on a signal after a drain, or at once when
// a part is lost that the others can't do without.
//
// Single-threaded: run() is the loop. Every child dies with this process (process.h).
// Example: tests/launch/service_test.py
#pragma once

#include <chrono>
#include <deque>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "client/client.h"
#include "common/service_config.h"
#include "launch/internal/commands.h"
#include "launch/internal/process.h"
#include "launch/internal/service_files.h"

namespace foretoken::launch {

struct SupervisorConfig {
  ServiceConfig service;  // model: a folder; threads_per_rank and kv_host_gib: resolved
  ServiceFiles files;
  Launcher launcher = Launcher::kMpirun;
  std::filesystem::path endpoint_file;  // empty: none
  bool quiet = false;                   // no progress and no ready line
};

// How often a group may die: kMostRestarts within kRestartWindow, with growing pauses between.
class RestartLimit {
 public:
  using Clock = std::chrono::steady_clock;
  // The pause before this restart; nullopt when there were too many.
  std::optional<std::chrono::milliseconds> next(Clock::time_point now);

 private:
  std::deque<Clock::time_point> recent_;
};

class Supervisor {
 public:
  // Blocks SIGINT, SIGTERM, and SIGHUP unless it is ignored: run() takes them.
  explicit Supervisor(SupervisorConfig config);
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  // Starts the service and runs it to its end; the exit code. Throws Exception when it can't start
  // or is lost.
  int run();

 private:
  struct Group {
    int number = 0;
    int life = 0;  // the newest one's number
    std::unique_ptr<Process> process = {};
    RestartLimit limit = {};
    std::string cause = {};  // of its death, if the coordinator has said it
    std::optional<RestartLimit::Clock::time_point> start_at = {};  // set: waits for its restart
  };

  void start();
  void start_group(Group& group);
  bool has_keys() const;
  void connect_client();
  // Sleeps until something happened or `timeout`; handles signals and the coordinator's words.
  void wait_for_events(std::chrono::milliseconds timeout);
  void read_signals();
  void read_coordinator();
  void on_coordinator_line(const std::string& line);
  void check_children();
  void on_group_end(Group& group, const ExitStatus& status);
  // The group that a line speaks of; null: it is none of ours, or the line is of a life before.
  Group* group_of(const nlohmann::json& line);
  // "worker group 0 exited with code 5: rank 0 (pid 7 on host) of group 0 failed: ..."
  std::string describe_end(const Group& group, const ExitStatus& status) const;
  void restart_group(Group& group, const std::string& reason);
  void start_due_groups();
  void watch_loading();
  void announce();
  void expect_end();
  void begin_drain();
  void stop_all();
  std::vector<Process*> running() const;

  SupervisorConfig config_;
  int signal_fd_ = -1;
  int signals_ = 0;  // that asked us to end
  bool ready_ = false;
  bool draining_ = false;
  bool drained_ = false;  // the coordinator has ended well
  std::optional<RestartLimit::Clock::time_point> drain_deadline_;
  std::string coordinator_line_;  // the part of a line that was read
  std::string last_detail_;       // of the loading status
  std::string endpoint_;
  std::unique_ptr<client::Client> client_;
  std::unique_ptr<Process> store_;
  std::unique_ptr<Process> coordinator_;
  std::vector<Group> groups_;
};

}  // namespace foretoken::launch
