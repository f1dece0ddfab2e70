#include "kvstore/internal/host_memory.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "kvstore/internal/arena.h"
#include "tests/kvstore/running_server.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;

bool is_filled_with(const SharedMapping& mapping, char value) {
  const std::string_view bytes(reinterpret_cast<const char*>(mapping.base()), mapping.bytes());
  return bytes.find_first_not_of(value) == std::string_view::npos;
}

// What an address is within its huge page, its offset is too: so that huge pages can be mapped.
TEST(SharedMapping, LiesInHugePagesAsItsOffsetDoes) {
  const FileDescriptor memory = make_shared_memory("test", 4 * kHuge).value_or_throw();
  for (const std::size_t offset : {std::size_t{0}, std::size_t{4096}, kHuge, kHuge + 8192}) {
    const auto mapping = SharedMapping::map(memory.get(), offset, 100'000).value_or_throw();
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mapping.base()) % kHuge, offset % kHuge);
    EXPECT_EQ(mapping.bytes(), 100'000U);
  }
}

TEST(SharedMapping, OfWhatIsNoMemoryFails) {
  const auto mapping = SharedMapping::map(-1, 0, 4096);
  ASSERT_FALSE(mapping);
  EXPECT_EQ(mapping.error().code, ErrorCode::kIo);
}

// All of it: whole huge pages, what lies before and after them, and less than one.
TEST(Populate, LeavesWhatItBacksAsItWas) {
  const FileDescriptor memory = make_shared_memory("test", 4 * kHuge).value_or_throw();
  const auto mapping = SharedMapping::map(memory.get(), 0, 4 * kHuge).value_or_throw();
  std::memset(mapping.base(), 'a', mapping.bytes());
  ASSERT_TRUE(populate(mapping.base(), 5000));
  ASSERT_TRUE(populate(mapping.base() + 5000, 3 * kHuge));
  ASSERT_TRUE(populate(mapping.base(), mapping.bytes()));
  EXPECT_TRUE(is_filled_with(mapping, 'a'));
  const auto other = SharedMapping::map(memory.get(), kHuge, 2 * kHuge).value_or_throw();
  EXPECT_TRUE(is_filled_with(other, 'a'));
}

std::size_t huge_bytes(const SharedMapping& mapping) {
  std::ifstream smaps("/proc/self/smaps");
  std::ostringstream begin;
  begin << std::hex << reinterpret_cast<std::uintptr_t>(mapping.base()) << '-';
  bool ours = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.find('-') < line.find(' ')) ours = line.starts_with(begin.str());
    constexpr std::string_view kField = "ShmemPmdMapped:";
    if (ours && line.starts_with(kField)) return 1024 * std::stoul(line.substr(kField.size()));
  }
  return 0;
}

TEST(Populate, GetsHugePagesWhereTheKernelHasThem) {
  const FileDescriptor memory = make_shared_memory("test", 6 * kHuge).value_or_throw();
  const auto mapping = SharedMapping::map(memory.get(), 0, 6 * kHuge).value_or_throw();
  constexpr int kCollapse = 25;  // MADV_COLLAPSE
  ASSERT_TRUE(populate(mapping.base(), 4096));
  if (madvise(mapping.base(), kHuge, kCollapse) != 0) {
    GTEST_SKIP() << "this kernel makes none: " << std::strerror(errno);
  }
  ASSERT_TRUE(populate(mapping.base() + kHuge - 4096, 3 * kHuge + 8192));
  EXPECT_EQ(huge_bytes(mapping), 4 * kHuge);
}

TEST(Populate, BacksAllPages) {
  const FileDescriptor memory = make_shared_memory("test", 4 * kHuge).value_or_throw();
  const auto mapping = SharedMapping::map(memory.get(), 0, 4 * kHuge).value_or_throw();
  const std::size_t from = kHuge - 8192;
  const std::size_t bytes = 2 * kHuge + 12'288;
  ASSERT_TRUE(populate(mapping.base() + from, bytes));
  struct stat file {};
  ASSERT_EQ(fstat(memory.get(), &file), 0);
  EXPECT_GE(static_cast<std::size_t>(file.st_blocks) * 512, bytes);
  std::vector<unsigned char> resident(bytes / 4096);
  ASSERT_EQ(mincore(mapping.base() + from, bytes, resident.data()), 0);
  EXPECT_TRUE(std::ranges::all_of(resident, [](unsigned char page) { return page & 1; }));
}

// Pieces are 32 slabs of each head here, and memory is there for six of them.
TEST(Arena, SettlesWhereMemoryIsShort) {
  std::atomic<int> calls{0};
  const auto six = [&calls](std::byte*, std::size_t) {
    errno = ENOMEM;
    return ++calls <= 6;
  };
  const ArenaLayout layout{2, kHuge, 320};
  const Arena arena(layout, NumaPlacement::kNone, six);
  pollfd progress{arena.progress_fd(), POLLIN, 0};
  while (!arena.is_settled()) ASSERT_GT(poll(&progress, 1, 10'000), 0);
  EXPECT_LE(arena.num_ready(), 96U);
  EXPECT_EQ(arena.num_ready() % 32, 0U);
  const Arena whole(layout, NumaPlacement::kNone, [](std::byte*, std::size_t) { return true; });
  progress.fd = whole.progress_fd();
  while (!whole.is_settled()) ASSERT_GT(poll(&progress, 1, 10'000), 0);
  EXPECT_EQ(whole.num_ready(), 320U);
}

}  // namespace
}  // namespace foretoken::kvstore
