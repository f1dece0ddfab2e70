// Memory, streams and events of a device, and the CPU device's pool and weight arena.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <fstream>
#include <numeric>
#include <random>
#include <thread>

#include "common/result.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/op_timing.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

TEST(DeviceMemory, IsCountedByUseAndBounded) {
  const auto device = make_cpu_device({.num_threads = 1, .memory_bytes = 1000});
  {
    const DeviceBuffer slots(*device, 600, MemoryUse::kKvSlots);
    const DeviceBuffer tables(*device, 300, MemoryUse::kTables);
    EXPECT_EQ(device->memory_in_use(MemoryUse::kKvSlots), 600U);
    EXPECT_EQ(device->memory_in_use(MemoryUse::kTables), 300U);
    try {
      const DeviceBuffer more(*device, 101, MemoryUse::kWeights);
      FAIL() << "101 bytes of 100";
    } catch (const Exception& exception) {
      EXPECT_EQ(exception.error().code, ErrorCode::kExhausted);
      EXPECT_NE(exception.error().message.find("101 bytes"), std::string::npos);
      EXPECT_NE(exception.error().message.find("weights"), std::string::npos);
    }
    EXPECT_EQ(device->memory_in_use(MemoryUse::kWeights), 0U);
  }
  EXPECT_EQ(device->memory_in_use(MemoryUse::kKvSlots), 0U);
  EXPECT_EQ(DeviceBuffer(*device, 1000, MemoryUse::kKvSlots).bytes(), 1000U);
}

TEST(DeviceMemory, BuffersMove) {
  const auto device = make_cpu_device({.num_threads = 1, .memory_bytes = 1000});
  DeviceBuffer first(*device, 100, MemoryUse::kTables);
  void* data = first.data();
  DeviceBuffer second = std::move(first);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(first.data(), nullptr);
  second = DeviceBuffer();
  EXPECT_EQ(device->memory_in_use(MemoryUse::kTables), 0U);
}

std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t total = 0;
  std::size_t resident = 0;
  statm >> total >> resident;
  return resident * 4096;
}

// The process has no more than is in use, however sequences of many lengths come and go.
TEST(DeviceMemory, IsGivenBackWhenItIsReleased) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "TSan has notes of all memory that was ever used, and they count";
#endif
  constexpr std::size_t kMost = std::size_t{48} << 20;
  const auto device = make_cpu_device({.num_threads = 1, .memory_bytes = kMost});
  std::mt19937 random(20261129);
  const std::size_t before = resident_bytes();
  std::size_t most = 0;
  std::deque<DeviceBuffer> buffers;
  for (int i = 0; i < 1'000; ++i) {
    const std::size_t bytes = 200'000 + random() % 6'000'000;
    while (device->memory_in_use(MemoryUse::kKvSlots) + bytes > kMost) {
      std::swap(buffers[random() % buffers.size()], buffers.back());
      buffers.pop_back();
    }
    buffers.emplace_back(*device, bytes, MemoryUse::kKvSlots);
    // A byte a page is enough, and fast.
    for (std::size_t at = 0; at < bytes; at += 4096) buffers.back().as<std::byte>()[at] = {};
    most = std::max(most, resident_bytes());
  }
  EXPECT_LT(most - before, kMost * 3 / 2);  // ASan keeps an eighth more, and books
}

TEST(DeviceMemory, UploadsRowsOneBehindTheOther) {
  TestDevice test;
  std::vector<std::byte> host(1000);
  for (std::size_t i = 0; i < host.size(); ++i) host[i] = static_cast<std::byte>(i % 251);
  for (const std::size_t count : {0, 1, 3, 99}) {
    const DeviceBuffer rows(*test.device, 7 * count, MemoryUse::kWeights);
    test.device->upload(rows.data(), {host.data(), count, 7, 10});
    test.device->finish_uploads();
    for (std::size_t row = 0; row < count; ++row) {
      EXPECT_EQ(std::memcmp(rows.as<std::byte>() + 7 * row, host.data() + 10 * row, 7), 0) << row;
    }
  }
}

TEST(DeviceMemory, CopiesAndClears) {
  TestDevice test;
  const std::vector<int> numbers = {1, 2, 3, 4};
  const DeviceBuffer a(*test.device, 16, MemoryUse::kTables);
  const DeviceBuffer b(*test.device, 16, MemoryUse::kTables);
  std::vector<int> back(4);
  test.device->copy_in(a.data(), numbers.data(), 16, *test.stream);
  test.device->copy(b.data(), a.data(), 16, *test.stream);
  test.device->fill_zero(b.as<int>() + 1, 8, *test.stream);
  test.device->copy_out(back.data(), b.data(), 16, *test.stream);
  test.stream->synchronize();
  EXPECT_EQ(back, (std::vector<int>{1, 0, 0, 4}));
}

TEST(Events, OrderACopyStreamAgainstCompute) {
  TestDevice test;
  const auto copies = test.device->make_stream(StreamKind::kCopy);
  const auto filled = test.device->make_event();
  EXPECT_TRUE(filled->done());  // never recorded
  filled->synchronize();

  std::vector<int> from(1 << 20, 0);
  std::vector<int> to(from.size(), 0);
  for (int round = 1; round <= 20; ++round) {
    std::fill(from.begin(), from.end(), round);
    test.device->copy(to.data(), from.data(), from.size() * sizeof(int), *copies);
    filled->record(*copies);
    filled->wait(*test.stream);
    EXPECT_TRUE(filled->done());
    EXPECT_EQ(to.front(), round);
    EXPECT_EQ(to.back(), round);
  }
}

TEST(Streams, ACopyStreamKeepsWhatAnOpThrew) {
  TestDevice test;
  const auto copies = test.device->make_stream(StreamKind::kCopy);
  auto& stream = static_cast<CpuStream&>(*copies);
  bool later_ran = false;
  stream.run([] { throw Exception(ErrorCode::kDevice, "broken"); });
  stream.run([&] { later_ran = true; });
  EXPECT_THROW(copies->synchronize(), Exception);
  EXPECT_TRUE(later_ran);
  copies->synchronize();  // reported once
}

TEST(ThreadPool, RunsEveryTaskOnceOnOneOfItsThreads) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const int tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      std::atomic<bool> known_threads = true;
      pool.parallel_for(tasks, [&](int task, int thread) {
        ++runs[static_cast<std::size_t>(task)];
        if (thread < 0 || thread >= threads) known_threads = false;
      });
      for (const auto& count : runs) EXPECT_EQ(count, 1);
      EXPECT_TRUE(known_threads);
    }
  }
}

TEST(OpTiming, TimesEachRepeatAlike) {
  TestDevice test;
  std::vector<int> runs(3);
  const Milliseconds each = time_recorded(*test.device, *test.stream, 3, [&](int i) {
    ++runs[static_cast<std::size_t>(i)];
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT_GE(each.count(), 1.0);
  EXPECT_EQ(runs[1], runs[2]);
  EXPECT_EQ(runs[0], runs[1] + 1);  // by itself, before all others
}

TEST(ThreadPool, SeesTheCallersWritesAndShowsItsOwn) {
  ThreadPool pool(3);
  std::vector<int> values(64, 0);
  for (int round = 1; round <= 2000; ++round) {
    values[0] = round;
    pool.parallel_for(64, [&](int task, int) {
      if (task > 0) values[static_cast<std::size_t>(task)] = round + task;
    });
    if (round % 500 == 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // let it sleep
    ASSERT_EQ(std::accumulate(values.begin(), values.end(), 0), 64 * round + 63 * 64 / 2);
  }
}

TEST(WeightArena, PiecesDoNotOverlapAndComeBack) {
  WeightArena arena;
  std::vector<std::pair<std::byte*, std::size_t>> live;
  for (const std::size_t bytes :
       {0UL, 1UL, 4096UL, 663552UL, 40UL << 20, 5000UL, 20UL << 20, 20UL << 20}) {
    auto* data = static_cast<std::byte*>(arena.allocate(bytes));
    std::memset(data, static_cast<int>(live.size()), bytes);
    live.push_back({data, bytes});
  }
  for (std::size_t i = 0; i < live.size(); ++i) {
    const auto [data, bytes] = live[i];
    EXPECT_EQ(std::count(data, data + bytes, static_cast<std::byte>(i)),
              static_cast<std::ptrdiff_t>(bytes));
  }
  for (const auto& [data, bytes] : live) arena.release(data);
  arena.release(arena.allocate(100));
}

}  // namespace
}  // namespace foretoken::kernels
