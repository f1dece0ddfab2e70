// Result<T>: a value, or the Error that says why there is none. Shaped like std::expected.
//
// Three kinds of trouble, three ways (CONTRIBUTING.md):
//   a bug                                  FT_CHECK ends the process          common/check.h
//   can't start, the device failed         throw Exception, main() prints it
//   an outcome a service must expect       return Result<T>
//
// Example: tests/common/result_test.cc
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "common/check.h"

namespace foretoken {

enum class ErrorCode {
  kInvalidArgument,  // the caller's request is wrong, and would be wrong again
  kNotFound,
  kExhausted,    // no room now; may pass
  kPending,      // it is on its way: ask again soon
  kTimeout,      // a deadline went by
  kCancelled,    // the one who asked no longer wants it
  kUnavailable,  // a peer is absent, loading or draining; may pass
  kCorrupt,      // bytes that fail their check: a file, a frame, a block
  kIo,           // the operating system refused or failed
  kUsage,        // command line
  kConfig,       // configuration
  kModelFile,    // model folder
  kDevice,       // GPU, NCCL or MPI
  kPortInUse,
  kInternal,
};

// "invalid_argument", "port_in_use", ...: the stable name, as it goes over the wire.
std::string_view error_code_name(ErrorCode code);
// The inverse; nullopt for a name that is none.
std::optional<ErrorCode> error_code_from_name(std::string_view name);

// What a program exits with when this ends it: 0 ok, 2 usage, 3 config, 4 model file, 5 device,
// 6 port in use, 75 try again, 1 anything else.
int exit_code(ErrorCode code);

struct Error {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;  // what failed, why, and what to do; one line, no trailing period
};

// Thrown where a process can't start or its device failed. main() catches it.
class Exception : public std::exception {
 public:
  Exception(ErrorCode code, std::string message) : error_{code, std::move(message)} {}
  explicit Exception(Error error) : error_(std::move(error)) {}
  const char* what() const noexcept override { return error_.message.c_str(); }
  const Error& error() const noexcept { return error_; }

 private:
  Error error_;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}      // NOLINT(google-explicit-constructor)
  Result(Error error) : state_(std::move(error)) {}  // NOLINT(google-explicit-constructor)

  bool has_value() const { return std::holds_alternative<T>(state_); }
  explicit operator bool() const { return has_value(); }

  // REQUIRES: has_value().
  T& value() & { return checked(); }
  const T& value() const& { return const_cast<Result*>(this)->checked(); }
  T&& value() && { return std::move(checked()); }
  T& operator*() & { return checked(); }
  const T& operator*() const& { return const_cast<Result*>(this)->checked(); }
  T&& operator*() && { return std::move(checked()); }
  T* operator->() { return &checked(); }
  const T* operator->() const { return &const_cast<Result*>(this)->checked(); }

  // REQUIRES: !has_value().
  const Error& error() const {
    FT_CHECK(!has_value());
    return std::get<Error>(state_);
  }

  // The value; or throws the error as an Exception. For start-up code.
  T value_or_throw() && {
    if (!has_value()) throw Exception(std::get<Error>(std::move(state_)));
    return std::get<T>(std::move(state_));
  }

 private:
  T& checked() {
    if (!has_value())
      check_failed("Result::has_value()", __FILE__, __LINE__, std::get<Error>(state_).message);
    return std::get<T>(state_);
  }
  std::variant<T, Error> state_;
};

// Success without a value.
struct Ok {};
using Status = Result<Ok>;

}  // namespace foretoken

// Returns the error of a Result from the calling function; else binds its value.
//   FT_ASSIGN_OR_RETURN(auto config, read_model_config(path));
#define FT_CONCAT_INNER(a, b) a##b
#define FT_CONCAT(a, b) FT_CONCAT_INNER(a, b)
#define FT_ASSIGN_OR_RETURN(decl, expr)                                                 \
  auto FT_CONCAT(ft_result_, __LINE__) = (expr);                                        \
  if (!FT_CONCAT(ft_result_, __LINE__)) return FT_CONCAT(ft_result_, __LINE__).error(); \
  decl = *std::move(FT_CONCAT(ft_result_, __LINE__))  // NOLINT(bugprone-macro-parentheses)
#define FT_RETURN_IF_ERROR(expr)                                       \
  do {                                                                 \
    if (auto ft_status = (expr); !ft_status) return ft_status.error(); \
  } while (false)
