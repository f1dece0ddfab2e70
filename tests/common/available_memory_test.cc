#include "common/available_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

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

TEST(ControlGroups, AreThoseAroundOursToo) {
  std::istringstream second("0::/system.slice/job_7/task_0\n");
  EXPECT_THAT(control_group_folders(second),
              testing::UnorderedElementsAre(
                  "/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/system.slice",
                  "/sys/fs/cgroup/system.slice/job_7", "/sys/fs/cgroup/system.slice/job_7/task_0"));
  std::istringstream first("11:cpu,cpuacct:/job\n4:memory:/job/step\n1:name=systemd:/x\n0::/\n");
  EXPECT_THAT(
      control_group_folders(first),
      testing::UnorderedElementsAre("/sys/fs/cgroup", "/sys/fs/cgroup/memory",
                                    "/sys/fs/cgroup/memory/job", "/sys/fs/cgroup/memory/job/step"));
}

TEST(HostMemory, IsNoMoreThanTheMachines) {
  const auto pages = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES));
  EXPECT_LE(host_memory(), pages * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)));
  EXPECT_GT(host_memory(), 0U);
}

}  // namespace
}  // namespace foretoken
