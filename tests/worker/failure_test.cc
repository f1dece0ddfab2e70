#include "worker/internal/failure.h"

#include <gtest/gtest.h>

#include <system_error>

namespace foretoken::worker {
namespace {

template <typename Failure>
Error error_of_thrown(const Failure& failure) {
  try {
    throw failure;
  } catch (const std::exception& caught) {
    return error_of(caught);
  }
}

// Exit code 5, and a line that says more than its type's name.
TEST(Failure, WhatIsNoneOfOursIsTheDevices) {
  const Error memory = error_of_thrown(std::bad_alloc());
  EXPECT_EQ(exit_code(memory.code), 5);
  EXPECT_NE(memory.message.find("no memory left"), std::string::npos) << memory.message;

  const Error other = error_of_thrown(std::system_error(EAGAIN, std::generic_category()));
  EXPECT_EQ(exit_code(other.code), 5);
  EXPECT_NE(other.message.find("temporarily unavailable"), std::string::npos) << other.message;
}

TEST(Failure, AnErrorOfOursStaysWhatItIs) {
  const Error error = error_of_thrown(Exception(ErrorCode::kModelFile, "no such tensor"));
  EXPECT_EQ(error.code, ErrorCode::kModelFile);
  EXPECT_EQ(error.message, "no such tensor");
}

}  // namespace
}  // namespace foretoken::worker
