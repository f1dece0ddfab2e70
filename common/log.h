// Logging: one line an event, to stderr. Never a prompt, an output or a key.
//
//   log_init("rank 1");
//   log().info("request {} admitted: {} tokens", raw(id), n);
//
// Thread-safe after log_init.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace foretoken {

// Names the process's lines, e.g. "coordinator" or "rank 1". FORETOKEN_LOG sets the level
// (trace, debug, info, warn, error), info by default; FORETOKEN_LOG_FORMAT=json the format.
void log_init(const std::string& who);

// The process's logger; a stderr logger at `info` until log_init ran.
spdlog::logger& log();

}  // namespace foretoken
