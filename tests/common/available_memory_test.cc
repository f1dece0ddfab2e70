#include "common/available_memory.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>

namespace foretoken {
namespace {

constexpr auto kUnbounded = std::numeric_limits<std::uint64_t>::max();
constexpr const char* kStat = "anon 300\nfile 500\ninactive_file 150\nactive_file 50\nshmem 300\n";

class ControlGroup : public testing::Test {
 protected:
  ~ControlGroup() override { std::filesystem::remove_all(folder); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder / name) << text;
  }
  std::uint64_t left() const { return left_in_control_group(folder.native()); }

  static std::filesystem::path make_folder() {
    std::string pattern = testing::TempDir() + "/control-group-XXXXXX";
    return mkdtemp(pattern.data());
  }
  const std::filesystem::path folder = make_folder();
};

TEST_F(ControlGroup, WhatIsNotBoundedIsNot) {
  EXPECT_EQ(left(), kUnbounded);
  write("memory.max", "max\n");
  write("memory.current", "800\n");
  EXPECT_EQ(left(), kUnbounded);
}

TEST_F(ControlGroup, WhatItHoldsIsNotLeftButForFilesPages) {
  write("memory.max", "1000\n");
  EXPECT_EQ(left(), 1000U);
  write("memory.current", "800\n");
  EXPECT_EQ(left(), 200U);
  write("memory.stat", kStat);
  EXPECT_EQ(left(), 400U);
  write("memory.current", "1300\n");  // the limit was lowered
  EXPECT_EQ(left(), 0U);
  write("memory.current", "100\n");  // read at another moment than the pages
  EXPECT_EQ(left(), 1000U);
}

TEST_F(ControlGroup, TheFirstVersionToo) {
  write("memory.limit_in_bytes", "1000\n");
  write("memory.usage_in_bytes", "800\n");
  write("memory.stat", kStat);
  EXPECT_EQ(left(), 400U);
}

}  // namespace
}  // namespace foretoken
