#include "common/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
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

// %*: the message as a JSON string. It may have any bytes: errors quote what a peer or a file says.
class JsonMessage : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& line, const std::tm&,
              spdlog::memory_buf_t& out) override {
    const std::string text = nlohmann::json(std::string(line.payload.data(), line.payload.size()))
                                 .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<JsonMessage>();
  }
};

}  // namespace

void log_init(const std::string& who) {
  auto& logger = *instance();
  logger.set_level(spdlog::level::from_str(std::string(env_or("FORETOKEN_LOG", "info"))));
  if (env_or("FORETOKEN_LOG_FORMAT", "text") == "json") {
    auto lines = std::make_unique<spdlog::pattern_formatter>();
    lines->add_flag<JsonMessage>('*').set_pattern(R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","who":")" +
                                                  who + R"(","level":"%l","message":%*})");
    logger.set_formatter(std::move(lines));
  } else {
    logger.set_pattern("%H:%M:%S.%e %^%L%$ [" + who + "] %v");
  }
  logger.flush_on(spdlog::level::info);
}

spdlog::logger& log() { return *instance(); }

}  // namespace foretoken
