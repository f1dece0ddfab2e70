// Both devices on a real file, at sizes of one sector and of many, and at their ends.
#include "kvstore/internal/block_device.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <liburing.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "kvstore/internal/file_descriptor.h"
#include "tests/kvstore/running_server.h"

namespace {

std::atomic<bool> kernel_has_no_memory = false;
std::atomic<bool> disk_stands_still = false;

}  // namespace

// In place of the library's: a disk that can be made to stand still.
extern "C" ssize_t pread(int file, void* to, size_t bytes, off_t offset) {
  while (disk_stands_still) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return syscall(SYS_pread64, file, to, bytes, offset);
}

// In place of the library's: an io_uring whose kernel can be made to take nothing.
extern "C" int io_uring_submit(io_uring* ring) {
  if (kernel_has_no_memory) return -EAGAIN;
  static const auto real =
      reinterpret_cast<int (*)(io_uring*)>(dlsym(RTLD_NEXT, "io_uring_submit"));
  return real(ring);
}

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
      device = make_thread_device(file.get(), memory, kDepth);
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
               ? make_thread_device(read_only.get(), memory, kDepth)
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

// A read that ends long after its device: it has its memory until then.
void expect_end_without(std::unique_ptr<BlockDevice> device, std::optional<IoMemory> memory,
                        const std::function<void()>& end_read) {
  device->submit({IoDirection::kRead, 0, memory->bytes().data(), kSector, 1});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // a thread has begun
  const auto begin = std::chrono::steady_clock::now();
  device.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 3 * kEndLimit);
  const std::byte* bytes = memory->bytes().data();
  memory.reset();
  EXPECT_EQ(*bytes, std::byte{0}) << "it is mapped still";
  end_read();
}

TEST(UringDevice, EndsWithoutWhatNeverEnds) {
  int ends[2] = {};  // of a pipe that nobody writes to
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const FileDescriptor out(ends[0]);
  const FileDescriptor in(ends[1]);
  IoMemory memory(kSector);
  auto device = make_uring_device(out.get(), memory, kDepth);
  if (!device) GTEST_SKIP() << "no io_uring here";
  expect_end_without(*std::move(device), std::move(memory), [&] {
    const std::vector<char> late(kSector, 'x');
    EXPECT_EQ(write(in.get(), late.data(), late.size()), static_cast<ssize_t>(late.size()));
  });
}

TEST(ThreadDevice, EndsWithoutWhatNeverEnds) {
  const FileDescriptor zeros(open("/dev/zero", O_RDONLY | O_CLOEXEC));
  IoMemory memory(kSector);
  auto device = make_thread_device(zeros.get(), memory, kDepth);
  disk_stands_still = true;
  expect_end_without(std::move(device), std::move(memory), [] {
    disk_stands_still = false;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // it is read, late
  });
}

TEST_P(BlockDeviceTest, WhatTheKernelDoesNotTakeIsAnError) {
  if (GetParam() == std::string("threads")) GTEST_SKIP() << "threads take everything";
  kernel_has_no_memory = true;
  for (std::uint64_t tag = 0; tag < 3 * kDepth; ++tag) {
    device->submit({IoDirection::kWrite, 0, buffer(0, 1).data(), kSector, tag});
    const auto results = wait_for(1);
    ASSERT_TRUE(results.contains(tag));
    EXPECT_EQ(results.at(tag).error().code, ErrorCode::kIo);
  }
  kernel_has_no_memory = false;
  for (std::uint64_t tag = 0; tag < kDepth; ++tag) {
    device->submit({IoDirection::kWrite, 0, buffer(0, 1).data(), kSector, tag});
    const auto results = wait_for(1);
    ASSERT_EQ(results.size(), 1U);
    EXPECT_TRUE(results.contains(tag) && results.at(tag));
  }
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
