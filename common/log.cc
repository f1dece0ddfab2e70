#include "common/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>

#include <cstdlib>
#include <memory>
#include <string_view>

namespace foretoken {
namespace {

std::shared_ptr<spdlog::logger>& instance() {
  static std::shared_ptr<spdlog::logger> logger = spdlog::stderr_color_mt("foretoken");
  return logger;
}

std::string_view env_or(const char* name, std::string_view fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::string_view(value) : fallback;
}

}  // namespace

void log_init(const std::string& who) {
  auto& logger = *instance();
  logger.set_level(spdlog::level::from_str(std::string(env_or("FORETOKEN_LOG", "info"))));
  if (env_or("FORETOKEN_LOG_FORMAT", "text") == "json") {
    logger.set_pattern(R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","who":")" + who +
                       R"(","level":"%l","message":"%v"})");
  } else {
    logger.set_pattern("%H:%M:%S.%e %^%L%$ [" + who + "] %v");
  }
  logger.flush_on(spdlog::level::info);
}

spdlog::logger& log() { return *instance(); }

}  // namespace foretoken
