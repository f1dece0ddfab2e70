// What the main() of each of the service's processes does around its work.
//
//   CLI::App app{"What it is for", "foretoken-thing"};
//   app.add_option(...);
//   return run_program(app, argc, argv, "thing", [&] { Thing(config).run(); });
#pragma once

#include <functional>
#include <string>

namespace CLI {
class App;
}

namespace foretoken {

// Reads the command line into `app`, names the log, does the work. Returns the exit code: 0 where
// the work is done or only help was asked for; exit_code() of the Exception that ended it, or 1 for
// another one; the code of kUsage for a command line that is wrong. What failed is logged, as one
// line.
int run_program(CLI::App& app, int argc, char** argv, const std::string& log_name,
                const std::function<void()>& work);

// For a process that holds what --kv-encrypt hides (the key, KV, prompts): from here on no crash
// leaves its memory on a disk. It can't be undone.
void forbid_core_dumps();

}  // namespace foretoken
