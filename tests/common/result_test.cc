#include "common/result.h"

#include <gtest/gtest.h>

#include <memory>

namespace foretoken {
namespace {

constexpr ErrorCode kAll[] = {
    ErrorCode::kInvalidArgument, ErrorCode::kNotFound,  ErrorCode::kExhausted,
    ErrorCode::kTimeout,         ErrorCode::kCancelled, ErrorCode::kUnavailable,
    ErrorCode::kCorrupt,         ErrorCode::kIo,        ErrorCode::kUsage,
    ErrorCode::kConfig,          ErrorCode::kModelFile, ErrorCode::kDevice,
    ErrorCode::kPortInUse,       ErrorCode::kInternal,  ErrorCode::kPending,
};

Result<int> half(int number) {
  if (number % 2 != 0) return Error{ErrorCode::kInvalidArgument, "odd"};
  return number / 2;
}
Result<int> quarter(int number) {
  FT_ASSIGN_OR_RETURN(const int once, half(number));
  FT_ASSIGN_OR_RETURN(const int twice, half(once));
  return twice;
}
Status check_even(int number) {
  FT_RETURN_IF_ERROR(half(number));
  return Ok{};
}

TEST(Result, HoldsAValueOrAnError) {
  const auto good = half(4);
  ASSERT_TRUE(good);
  EXPECT_EQ(*good, 2);
  const auto bad = half(3);
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(bad.error().message, "odd");
}

TEST(Result, PassesErrorsOn) {
  EXPECT_EQ(*quarter(8), 2);
  EXPECT_FALSE(quarter(6));
  EXPECT_TRUE(check_even(2));
  EXPECT_FALSE(check_even(3));
}

TEST(Result, CarriesWhatCanOnlyBeMoved) {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(7);
  const auto value = *std::move(result);
  EXPECT_EQ(*value, 7);
}

TEST(Result, ThrowsItsErrorForStartUpCode) {
  EXPECT_EQ(half(4).value_or_throw(), 2);
  try {
    half(3).value_or_throw();
    FAIL() << "nothing was thrown";
  } catch (const Exception& exception) {
    EXPECT_EQ(exception.error().code, ErrorCode::kInvalidArgument);
    EXPECT_STREQ(exception.what(), "odd");
  }
}

TEST(ResultDeathTest, ReadingAnErrorsValueIsABug) {
  const auto bad = half(3);
  EXPECT_DEATH(static_cast<void>(*bad), "odd");
  const auto good = half(4);
  EXPECT_DEATH(static_cast<void>(good.error()), "check failed");
}

TEST(ErrorCode, NamesAreUniqueAndComeBack) {
  for (const auto code : kAll) {
    EXPECT_EQ(error_code_from_name(error_code_name(code)), code);
    EXPECT_NE(exit_code(code), 0);
  }
  EXPECT_EQ(error_code_from_name("no such thing"), std::nullopt);
  EXPECT_EQ(exit_code(ErrorCode::kUsage), 2);
  EXPECT_EQ(exit_code(ErrorCode::kConfig), 3);
  EXPECT_EQ(exit_code(ErrorCode::kModelFile), 4);
  EXPECT_EQ(exit_code(ErrorCode::kDevice), 5);
  EXPECT_EQ(exit_code(ErrorCode::kPortInUse), 6);
  EXPECT_EQ(exit_code(ErrorCode::kExhausted), 75);
}

}  // namespace
}  // namespace foretoken
