// RunningServer: a store on a thread of this process, in a folder of its own; for tests.
#pragma once

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "kvstore/internal/server.h"
#include "kvstore/kv_store.h"

namespace foretoken::kvstore {

class TestFolder {
 public:
  TestFolder() {
    std::string pattern = testing::TempDir() + "/store-XXXXXX";
    path_ = mkdtemp(pattern.data());
  }
  ~TestFolder() { std::filesystem::remove_all(path_); }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;
  std::string socket() const { return (path_ / "store").native(); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

class RunningServer {
 public:
  explicit RunningServer(std::size_t arena_bytes, std::optional<NvmeConfig> nvme = std::nullopt,
                         Arena::Populate populate = kvstore::populate)
      : stop_(eventfd(0, EFD_CLOEXEC)),
        server_({folder_.socket(), arena_bytes, NumaPlacement::kSpread, std::move(nvme),
                 std::move(populate)}),
        thread_([this] { server_.run(stop_.get()); }) {}
  ~RunningServer() {
    eventfd_write(stop_.get(), 1);
    thread_.join();
  }
  RunningServer(const RunningServer&) = delete;
  RunningServer& operator=(const RunningServer&) = delete;
  std::string socket() const { return folder_.socket(); }

 private:
  TestFolder folder_;
  FileDescriptor stop_;
  Server server_;
  std::thread thread_;
};

// Asks until `holds(stat)`, for at most ten seconds: what depends on another process's exit, or on
// memory being touched, comes when it comes.
template <typename Holds>
testing::AssertionResult eventually(KvStore& store, const Holds& holds) {
  for (int i = 0; i < 1'000; ++i) {
    const auto stat = store.stat();
    if (!stat) return testing::AssertionFailure() << stat.error().message;
    if (holds(*stat)) return testing::AssertionSuccess();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return testing::AssertionFailure() << "not within ten seconds";
}
inline testing::AssertionResult ready(KvStore& store) {
  return eventually(store, [](const StoreStat& stat) {
    return stat.slabs_total > 0 && stat.slabs_ready == stat.slabs_total;
  });
}

inline StoreClientConfig test_client(const std::string& socket, int rank, int epoch = 1) {
  StoreClientConfig config;
  config.socket_path = socket;
  config.rank = rank;
  config.epoch = Epoch{static_cast<std::uint32_t>(epoch)};
  config.model_hash = "test-model";
  config.total_kv_heads = 3;
  config.first_head = rank;  // rank 0 has heads 0 and 1, rank 1 has 1 and 2
  config.shape = {3, 2, 64, kernels::DataType::kFp16};
  config.timeout = std::chrono::seconds(20);
  return config;
}

}  // namespace foretoken::kvstore
