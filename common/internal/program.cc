#include "common/program.h"

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

}  // namespace foretoken
