// What ended a rank, for its coordinator and its exit code.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "common/result.h"

namespace foretoken::worker {

// Exception's own error; kDevice for what is none of ours, as memory or threads that the host does
// not have.
inline Error error_of(const std::exception& failure) {
  if (const auto* ours = dynamic_cast<const Exception*>(&failure)) return ours->error();
  if (dynamic_cast<const std::bad_alloc*>(&failure) != nullptr) {
    return {ErrorCode::kDevice, "the host has no memory left for this rank, or its limit is low"};
  }
  return {ErrorCode::kDevice, std::string("this rank failed: ") + failure.what()};
}

}  // namespace foretoken::worker
