// Both devices on a real file, at sizes of one sector and of many, and at their ends.
#include "kvstore/internal/block_device.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/stat.h>

#include <cstring>
#include <map>
#include <random>

#include "kvstore/internal/file_descriptor.h"
#include "tests/kvstore/running_server.h"

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261124;
constexpr std::size_t kSector = 4096;
constexpr int kDepth = 8;

class BlockDeviceTest : public testing::TestWithParam<const char*> {
 protected:
  BlockDeviceTest()
      : file(open((folder.path() / "file").c_str(), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600)),
        memory(kDepth * 64 * kSector) {
    if (GetParam() == std::string("threads")) {
      device = make_thread_device(file.get(), kDepth);
      return;
    }
    auto uring = make_uring_device(file.get(), memory, kDepth);
    if (uring) device = *std::move(uring);
  }
  void SetUp() override {
    ASSERT_TRUE(file);
    if (!device) GTEST_SKIP() << "no io_uring here";
  }

  std::span<std::byte> buffer(std::size_t index, std::size_t sectors) const {
    return memory.bytes().subspan(index * 64 * kSector, sectors * kSector);
  }
  // Ends all that is in flight, by tag.
  std::map<std::uint64_t, Result<std::size_t>> wait_for(std::size_t count) {
    std::map<std::uint64_t, Result<std::size_t>> results;
    while (results.size() < count) {
      pollfd ready{device->completion_fd(), POLLIN, 0};
      if (poll(&ready, 1, 10'000) != 1) break;
      for (auto& done : device->completed()) results.emplace(done.tag, std::move(done.bytes));
    }
    return results;
  }

  TestFolder folder;
  FileDescriptor file;
  IoMemory memory;
  std::unique_ptr<BlockDevice> device;
};

TEST_P(BlockDeviceTest, ReadsBackWhatItWroteManyAtATime) {
  std::mt19937 random(kSeed);
  std::vector<std::vector<std::byte>> written;
  for (std::size_t i = 0; i < kDepth; ++i) {
    const auto bytes = buffer(i, i == 0 ? 1 : 64 - i);
    for (auto& byte : bytes) byte = static_cast<std::byte>(random());
    written.emplace_back(bytes.begin(), bytes.end());
    device->submit({IoDirection::kWrite, i * 64 * kSector, bytes.data(), bytes.size(), i});
  }
  for (const auto& [tag, bytes] : wait_for(kDepth)) {
    ASSERT_TRUE(bytes);
    EXPECT_EQ(*bytes, written[tag].size());
  }
  std::ranges::fill(memory.bytes(), std::byte{0});
  for (std::size_t i = 0; i < kDepth; ++i) {
    device->submit(
        {IoDirection::kRead, i * 64 * kSector, buffer(i, 64).data(), written[i].size(), i});
  }
  ASSERT_EQ(wait_for(kDepth).size(), kDepth);
  for (std::size_t i = 0; i < kDepth; ++i) {
    EXPECT_EQ(std::memcmp(buffer(i, 64).data(), written[i].data(), written[i].size()), 0) << i;
  }
}

TEST_P(BlockDeviceTest, ReadsUpToTheEnd) {
  ASSERT_TRUE(device->resize(3 * kSector));
  device->submit({IoDirection::kRead, kSector, buffer(0, 8).data(), 8 * kSector, 1});
  device->submit({IoDirection::kRead, 4 * kSector, buffer(1, 8).data(), 8 * kSector, 2});
  const auto results = wait_for(2);
  EXPECT_EQ(*results.at(1), 2 * kSector);
  EXPECT_EQ(*results.at(2), 0U);
}

TEST_P(BlockDeviceTest, AFailureIsAnError) {
  const FileDescriptor read_only(open((folder.path() / "file").c_str(), O_RDONLY | O_CLOEXEC));
  device = GetParam() == std::string("threads")
               ? make_thread_device(read_only.get(), kDepth)
               : make_uring_device(read_only.get(), memory, kDepth).value_or_throw();
  device->submit({IoDirection::kWrite, 0, buffer(0, 1).data(), kSector, 1});
  const auto results = wait_for(1);
  ASSERT_FALSE(results.at(1));
  EXPECT_EQ(results.at(1).error().code, ErrorCode::kIo);
}

TEST_P(BlockDeviceTest, EndsWithOperationsInFlight) {
  for (std::uint64_t i = 0; i < kDepth; ++i) {
    device->submit({IoDirection::kWrite, i * kSector, buffer(i, 1).data(), kSector, i});
  }
  device.reset();
}

INSTANTIATE_TEST_SUITE_P(, BlockDeviceTest, testing::Values("io_uring", "threads"));

TEST(IoResult, TellsAFullDiskFromABrokenOne) {
  EXPECT_EQ(*io_result(4096), 4096U);
  EXPECT_EQ(io_result(-ENOSPC).error().code, ErrorCode::kExhausted);
  EXPECT_EQ(io_result(-EDQUOT).error().code, ErrorCode::kExhausted);
  EXPECT_EQ(io_result(-EIO).error().code, ErrorCode::kIo);
}

}  // namespace
}  // namespace foretoken::kvstore
