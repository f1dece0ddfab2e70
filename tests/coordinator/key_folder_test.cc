#include "coordinator/key_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

namespace foretoken::coordinator {
namespace {

using ::testing::HasSubstr;

class KeyFolderTest : public ::testing::Test {
 protected:
  KeyFolderTest() {
    char name[] = "/tmp/foretoken_key_folder_XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~KeyFolderTest() override { std::filesystem::remove_all(folder_); }
  std::string why() {
    const auto keys = open_key_folder(folder_);
    return keys ? "accepted" : keys.error().message;
  }
  std::filesystem::path folder_;
};

TEST_F(KeyFolderTest, MakesKeysOnceAndKeepsThemPrivate) {
  const auto first = open_key_folder(folder_).value_or_throw();
  const auto second = open_key_folder(folder_).value_or_throw();
  EXPECT_EQ(first.server.secret_key, second.server.secret_key);
  EXPECT_EQ(first.client.own.secret_key, second.client.own.secret_key);
  EXPECT_EQ(first.client.server_public_key, first.server.public_key);
  EXPECT_NE(first.client.own.public_key, first.worker.own.public_key);
  for (const auto* name : {"server.key", "client.key", "worker.key"}) {
    struct stat info {};
    ASSERT_EQ(::stat((folder_ / name).c_str(), &info), 0) << name;
    EXPECT_EQ(info.st_mode & 0777, 0600U) << name;
  }
}

TEST_F(KeyFolderTest, ClientsOfALostServerKeyGetNewOnes) {
  const auto first = open_key_folder(folder_).value_or_throw();
  std::filesystem::remove(folder_ / "server.key");
  const auto second = open_key_folder(folder_).value_or_throw();
  EXPECT_NE(first.server.public_key, second.server.public_key);
  EXPECT_EQ(second.client.server_public_key, second.server.public_key);
}

TEST_F(KeyFolderTest, ReadsWhoElseMayConnect) {
  const auto key = make_key_pair().public_key;
  ASSERT_TRUE(write_private_file(folder_ / "authorized_keys", "# a colleague\n" + key + "\n\n"));
  EXPECT_EQ(open_key_folder(folder_)->authorized, std::vector<std::string>{key});
  ASSERT_TRUE(write_private_file(folder_ / "authorized_keys", std::string(65537, '#')));
  EXPECT_THAT(why(), HasSubstr("larger than 65536 bytes"));
  ASSERT_TRUE(write_private_file(folder_ / "authorized_keys", key + "\nnonsense\n"));
  EXPECT_THAT(why(), HasSubstr("line 2"));
}

TEST_F(KeyFolderTest, RefusesKeysThatOthersCanReadOrThatAreNone) {
  static_cast<void>(open_key_folder(folder_).value_or_throw());
  ASSERT_EQ(::chmod((folder_ / "server.key").c_str(), 0644), 0);
  EXPECT_THAT(why(), HasSubstr("chmod 600"));
  ASSERT_TRUE(write_private_file(folder_ / "server.key", "{}"));
  EXPECT_THAT(why(), HasSubstr("no CURVE key pair"));
  ASSERT_TRUE(write_private_file(folder_ / "server.key", "nonsense"));
  EXPECT_THAT(why(), HasSubstr("no CURVE key pair"));
}

}  // namespace
}  // namespace foretoken::coordinator
