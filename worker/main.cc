// foretoken-worker: one tensor-parallel rank. Started by mpirun or srun, one process a GPU or CPU
// shard:  mpirun -n 2 foretoken-worker --coordinator ENDPOINT --key-file F
#include <mpi.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

#include "common/log.h"
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
  ~Mpi() {
    if (failed_with_ == 0) {
      MPI_Finalize();
    } else {
      MPI_Abort(MPI_COMM_WORLD, failed_with_);
    }
  }
  Mpi(const Mpi&) = delete;
  Mpi& operator=(const Mpi&) = delete;
  void fail(int status) { failed_with_ = status; }

 private:
  int failed_with_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // no rank outlives its mpirun
  CLI::App app{"One tensor-parallel rank of a Foretoken worker group", "foretoken-worker"};
  foretoken::worker::RankConfig config;
  app.add_option("--coordinator", config.coordinator, "ZeroMQ endpoint of the coordinator")
      ->required();
  app.add_option("--key-file", config.key_file, "CURVE keys to connect with");
  app.add_option("--group", config.group, "number of this worker group")->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  Mpi mpi(&argc, &argv);
  foretoken::log_init("worker");
  try {
    foretoken::worker::run_rank(config);
    return 0;
  } catch (const foretoken::Exception& failure) {
    foretoken::log().error("{}", failure.what());
    const int status = foretoken::exit_code(failure.error().code);
    mpi.fail(status);
    return status;
  } catch (const std::exception& failure) {
    foretoken::log().error("{}", failure.what());
    mpi.fail(1);
    return 1;
  }
}
