// foretoken-worker: one tensor-parallel rank. Started by mpirun or srun, one process a GPU or CPU
// shard:  mpirun -n 2 foretoken-worker --coordinator ENDPOINT --key-file F
#include <mpi.h>
#include <sys/prctl.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <csignal>
#include <functional>
#include <iostream>
#include <optional>

#include "common/program.h"
#include "worker/bench.h"
#include "worker/device_probe.h"
#include "worker/rank.h"

namespace {

// MPI for as long as the process computes. A rank that failed must not wait in MPI_Finalize for
// the others: it aborts, and mpirun ends the group.
class Mpi {
 public:
  Mpi(int* argc, char*** argv) {
    int provided = 0;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
  }
  Mpi(const Mpi&) = delete;
  Mpi& operator=(const Mpi&) = delete;
  ~Mpi() {
    if (status_ == 0) {
      MPI_Finalize();
    } else {
      MPI_Abort(MPI_COMM_WORLD, status_);
    }
  }
  void end_with(int status) { status_ = status; }

 private:
  int status_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // no rank outlives its mpirun
  CLI::App app{"One tensor-parallel rank of a Foretoken worker group", "foretoken-worker"};
  foretoken::worker::RankConfig config;
  std::function<void()> without_mpi;  // what was asked for in place of a rank
  app.add_flag_callback(
      "--probe-devices",
      [&] { without_mpi = [] { std::cout << foretoken::worker::probe_devices() << std::endl; }; },
      "say what GPUs there are, as JSON, and end");
  foretoken::worker::add_bench_commands(app, without_mpi);
  auto* coordinator =
      app.add_option("--coordinator", config.coordinator, "ZeroMQ endpoint of the coordinator");
  app.callback([&] {
    if (!without_mpi && !*coordinator) throw CLI::RequiredError("--coordinator");
  });
  app.add_option("--key-file", config.key_file, "CURVE keys to connect with");
  app.add_option("--group", config.group, "number of this worker group")->capture_default_str();
  app.add_option("--life", config.life,
                 "how often this group has been started, this time included");
  app.add_option_function<int>(
         "--coordinator-timeout-s",
         [&config](int seconds) { config.coordinator_timeout = std::chrono::seconds(seconds); },
         "silence of the coordinator after which this rank ends; 30 by default")
      ->check(CLI::Range(1, 86'400));

  std::optional<Mpi> mpi;
  const int status = foretoken::run_program(app, argc, argv, "worker", [&] {
    if (without_mpi) return without_mpi();
    mpi.emplace(&argc, &argv);
    foretoken::worker::run_rank(config);
  });
  if (mpi) mpi->end_with(status);
  return status;
}
