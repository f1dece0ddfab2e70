#include "common/result.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>

namespace foretoken {
namespace {

struct CodeName {
  ErrorCode code;
  std::string_view name;
  int exit_code;
};

constexpr std::array kCodes = {
    CodeName{ErrorCode::kInvalidArgument, "invalid_argument", 2},
    CodeName{ErrorCode::kNotFound, "not_found", 1},
    CodeName{ErrorCode::kExhausted, "exhausted", 75},
    CodeName{ErrorCode::kPending, "pending", 75},
    CodeName{ErrorCode::kTimeout, "timeout", 75},
    CodeName{ErrorCode::kCancelled, "cancelled", 1},
    CodeName{ErrorCode::kUnavailable, "unavailable", 75},
    CodeName{ErrorCode::kCorrupt, "corrupt", 1},
    CodeName{ErrorCode::kIo, "io", 1},
    CodeName{ErrorCode::kUsage, "usage", 2},
    CodeName{ErrorCode::kConfig, "config", 3},
    CodeName{ErrorCode::kModelFile, "model_file", 4},
    CodeName{ErrorCode::kDevice, "device", 5},
    CodeName{ErrorCode::kPortInUse, "port_in_use", 6},
    CodeName{ErrorCode::kInternal, "internal", 1},
};

const CodeName& entry(ErrorCode code) {
  const auto* found = std::find_if(kCodes.begin(), kCodes.end(),
                                   [code](const CodeName& c) { return c.code == code; });
  FT_CHECK(found != kCodes.end(), static_cast<int>(code));
  return *found;
}

}  // namespace

void check_failed(std::string_view condition, const char* file, int line,
                  const std::string& values) {
  std::fprintf(stderr, "foretoken: check failed: %.*s at %s:%d:%s\n",
               static_cast<int>(condition.size()), condition.data(), file, line, values.c_str());
  std::abort();
}

std::string_view error_code_name(ErrorCode code) { return entry(code).name; }

std::optional<ErrorCode> error_code_from_name(std::string_view name) {
  const auto* found = std::find_if(kCodes.begin(), kCodes.end(),
                                   [name](const CodeName& c) { return c.name == name; });
  if (found == kCodes.end()) return std::nullopt;
  return found->code;
}

int exit_code(ErrorCode code) { return entry(code).exit_code; }

}  // namespace foretoken
