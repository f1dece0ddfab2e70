// Runs of a sequence's KV to and from the NVMe file, as a rank moves them
// (kvstore/internal/run_io.h): 128 KiB each (the 8B shape), GB/s into a new file, over it, and back
// in random order. As JSON.
//   run_io_bench DIR [GIB]     DIR: mode 0700, holds no KV
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "common/check.h"
#include "common/result.h"
#include "kvstore/internal/nvme_file.h"
#include "kvstore/internal/run_io.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kRunBytes = std::size_t{128} << 10;

class Mover final : public RunIo::Owner {
 public:
  explicit Mover(const NvmeFile& file)
      : memory_(RunIo::kDepth * kRunBytes),
        io_(memory_, make_block_device(file.fd(), memory_, RunIo::kDepth), kRunBytes) {}
  ~Mover() override { io_.forget(*this); }
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;

  double gb_per_s(IoDirection direction, const std::vector<std::uint32_t>& order) {
    const auto begin = std::chrono::steady_clock::now();
    for (const std::uint32_t run : order) {
      const RunIo::Extent extent{run * std::uint64_t{kRunBytes}, kRunBytes};
      if (direction == IoDirection::kRead) {
        while (!io_.can_read()) io_.wait();
        io_.read(*this, RunIndex{run}, extent, std::nullopt);
      } else {
        while (!io_.can_write()) io_.wait();
        std::ranges::fill(io_.next_buffer().first(64), std::byte(run));
        io_.write(*this, RunIndex{run}, extent);
      }
    }
    while (io_.is_busy()) io_.wait();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    return static_cast<double>(order.size() * kRunBytes) / took.count() / 1e9;
  }

  void on_read(RunIndex run, const Result<std::span<const std::byte>>& bytes) override {
    FT_CHECK(bytes && (*bytes)[63] == std::byte(static_cast<std::uint32_t>(run)));
  }
  void on_written(RunIndex /*run*/, const Result<Seal>& written) override {
    FT_CHECK(written.has_value());
  }

 private:
  IoMemory memory_;
  RunIo io_;
};

void run_bench(const char* folder, double gib) {
  const NvmeFile file(folder);
  if (file.allocated_bytes() > 0) throw Exception(ErrorCode::kConfig, "the folder holds KV");
  file.remove();
  std::vector<std::uint32_t> order(static_cast<std::size_t>(gib * 8192));
  std::iota(order.begin(), order.end(), 0U);
  resize_file(file.fd(), order.size() * std::uint64_t{kRunBytes}).value_or_throw();
  Mover mover(file);
  const double fresh = mover.gb_per_s(IoDirection::kWrite, order);
  const double over = mover.gb_per_s(IoDirection::kWrite, order);
  std::ranges::shuffle(order, std::mt19937(20261129));
  const double read = mover.gb_per_s(IoDirection::kRead, order);
  std::printf(
      "{\"bench\":\"run-io\",\"run_bytes\":%zu,\"read_depth\":%d,\"write_depth\":%d,"
      "\"write_gb_per_s\":%.2f,\"write_over_gb_per_s\":%.2f,\"read_gb_per_s\":%.2f}\n",
      kRunBytes, RunIo::kDepth, RunIo::kDepth / 2, fresh, over, read);
}

}  // namespace
}  // namespace foretoken::kvstore

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) return 2;
  try {
    foretoken::kvstore::run_bench(argv[1], argc == 3 ? std::atof(argv[2]) : 2);
  } catch (const foretoken::Exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
