#include "launch/internal/files.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>

#include "launch/internal/endpoint_file.h"

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

void write(const fs::path& path, const std::string& text) { std::ofstream(path) << text; }

TEST(RuntimeFolder, IsPrivateAndGoesAway) {
  fs::path path;
  {
    const RuntimeFolder folder;
    path = folder.path();
    struct stat info {};
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0700U);
    write(path / "something", "");
  }
  EXPECT_FALSE(fs::exists(path));
}

TEST(ReadIds, TakesAListAndNothingElse) {
  const RuntimeFolder folder;
  const fs::path path = folder.path() / "ids.json";
  write(path, "[1, 2, 49151]");
  EXPECT_THAT(*read_ids(path), ElementsAre(1, 2, 49151));
  for (const char* text : {"", "{}", "[1.5]", "[-1]", "[4294967296]", "[\"1\"]", "[1"}) {
    write(path, text);
    EXPECT_FALSE(read_ids(path)) << text;
  }
}

TEST(ReadText, AnEmptyFileIsAText) {
  const RuntimeFolder folder;
  write(folder.path() / "empty", "");
  ASSERT_TRUE(read_text(folder.path() / "empty"));
  EXPECT_EQ(*read_text(folder.path() / "empty"), "");
  EXPECT_FALSE(read_text(folder.path() / "absent"));
  EXPECT_FALSE(read_text(folder.path()));
}

TEST(FindModel, TakesAFolderOrAName) {
  const RuntimeFolder folder;
  fs::create_directories(folder.path() / "tiny");
  write(folder.path() / "tiny" / "config.json", "{}");
  setenv("FORETOKEN_MODELS", folder.path().c_str(), 1);
  EXPECT_EQ(*find_model("tiny"), folder.path() / "tiny");
  EXPECT_EQ(*find_model((folder.path() / "tiny").string()), folder.path() / "tiny");
  const fs::path loop = folder.path() / "loop";  // as unreadable as another user's, to root too
  fs::create_symlink(loop, loop);
  const std::string absent[] = {"absent", "/nowhere/at/all", "x.gguf", "loop", loop.string()};
  for (const std::string& name : absent) {
    const auto found = find_model(name);
    ASSERT_FALSE(found) << name;
    EXPECT_EQ(found.error().code, ErrorCode::kModelFile);
  }
  EXPECT_THAT(find_model("x.gguf").error().message, HasSubstr("model import"));
  unsetenv("FORETOKEN_MODELS");
}

TEST(EndpointFile, ComesBackAndIsPrivate) {
  const RuntimeFolder folder;
  const fs::path path = folder.path() / "endpoint.json";
  ASSERT_TRUE(write_endpoint_file(
      path, {.endpoint = "tcp://127.0.0.1:8000", .key_file = "k", .model = "m", .pid = 7}));
  const auto read = read_endpoint_file(path);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->endpoint, "tcp://127.0.0.1:8000");
  EXPECT_EQ(read->pid, 7);
  write(path, "{}");
  EXPECT_FALSE(read_endpoint_file(path));
}

}  // namespace
}  // namespace foretoken::launch
