// FT_CHECK(cond, values...): ends the process, in every build, when cond is false: a bug, never
// something that data, a peer or a disk can cause. Prints the condition, the place and the values.
#pragma once

#include <sstream>
#include <string>
#include <string_view>

namespace foretoken {

[[noreturn]] void check_failed(std::string_view condition, const char* file, int line,
                               const std::string& values);

template <typename... Values>
std::string check_values(const Values&... values) {
  std::ostringstream out;
  ((out << ' ' << values), ...);
  return out.str();
}

}  // namespace foretoken

#define FT_CHECK(cond, ...)                                                       \
  (static_cast<bool>(cond) ? static_cast<void>(0)                                 \
                           : ::foretoken::check_failed(#cond, __FILE__, __LINE__, \
                                                       ::foretoken::check_values(__VA_ARGS__)))
