#include "common/private_folder.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "common/result.h"

namespace foretoken {
namespace {

namespace fs = std::filesystem;

mode_t mode_of(const fs::path& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 ? info.st_mode & 07777 : 0;
}

class PrivateFolder : public testing::Test {
 protected:
  PrivateFolder() {
    std::string pattern = testing::TempDir() + "/private-XXXXXX";
    above = mkdtemp(pattern.data());
  }
  ~PrivateFolder() override { fs::remove_all(above); }

  fs::path above;
};

TEST_F(PrivateFolder, IsMadeWhereItIsAbsent) {
  require_private_folder(above / "made");
  EXPECT_EQ(mode_of(above / "made"), 0700U);
  require_private_folder(above / "made");
}

// As root `--runtime-dir /tmp` would take /tmp from everybody.
TEST_F(PrivateFolder, OneThatOthersCanEnterIsRefusedAndStaysAsItIs) {
  const fs::path open = above / "open";
  fs::create_directory(open);
  for (const mode_t mode : {01777U, 0750U, 0701U}) {
    ASSERT_EQ(chmod(open.c_str(), mode), 0);
    EXPECT_THROW(require_private_folder(open), Exception);
    EXPECT_EQ(mode_of(open), mode);
  }
}

TEST_F(PrivateFolder, WhatCanNotBeAFolderIsRefused) {
  std::ofstream(above / "file") << "x";
  EXPECT_THROW(require_private_folder(above / "file"), Exception);
  EXPECT_THROW(require_private_folder(above / "absent" / "below"), Exception);
}

}  // namespace
}  // namespace foretoken
