#include "common/program.h"

#include <sys/resource.h>

#include <CLI/CLI.hpp>

#include "common/log.h"
#include "common/result.h"

namespace foretoken {

int run_program(CLI::App& app, int argc, char** argv, const std::string& log_name,
                const std::function<void()>& work) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : exit_code(ErrorCode::kUsage);
  }
  log_init(log_name);
  try {
    work();
    return 0;
  } catch (const Exception& failure) {
    log().error("{}", failure.what());
    return exit_code(failure.error().code);
  } catch (const std::exception& failure) {
    log().error("{}", failure.what());
    return exit_code(ErrorCode::kInternal);
  }
}

// Less than a page, so that there is no file; and the one limit at which the kernel doesn't start
// the program of core_pattern either, for which 0 is none (fs/coredump.c). Not PR_SET_DUMPABLE:
// that also takes ranks' way into each other's memory, by which MPI copies.
void forbid_core_dumps() {
  constexpr rlimit kNone{.rlim_cur = 1, .rlim_max = 1};
  if (setrlimit(RLIMIT_CORE, &kNone) == 0) return;
  log().warn(
      "the limit of core dumps is 0 and can't be 1: there is no core file, but a program in "
      "kernel.core_pattern may get this process's memory");
}

}  // namespace foretoken
