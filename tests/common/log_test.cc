#include "common/log.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

namespace foretoken {
namespace {

TEST(Log, AJsonLineIsOneObjectWhateverTheMessageHas) {
  setenv("FORETOKEN_LOG_FORMAT", "json", 1);
  log_init("rank 1");
  for (const std::string message :
       {"plain", "two\nlines", R"(a "quoted" \ word)", "tab\t and \x01", "Gr\u00fc\u00dfe"}) {
    ::testing::internal::CaptureStderr();
    log().info("{}", message);
    const std::string line = ::testing::internal::GetCapturedStderr();
    EXPECT_EQ(line.find('\n'), line.size() - 1) << line;
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(json.is_object()) << line;
    EXPECT_EQ(json.at("message"), message);
    EXPECT_EQ(json.at("who"), "rank 1");
    EXPECT_EQ(json.at("level"), "info");
  }
  ::testing::internal::CaptureStderr();
  log().info("bytes \xff\xfe");
  EXPECT_TRUE(nlohmann::json::accept(::testing::internal::GetCapturedStderr()));
}

}  // namespace
}  // namespace foretoken
