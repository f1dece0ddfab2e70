// What bounds the way of kept weights to a GPU, and what pinning a large arena costs.
//
//   upload_bench [--parts link,upload,pin] [--gib 4] [--pin-gib 8] [--seconds 60]
//
//   link    pinned memory to the device: the most there is
//   upload  kernels/cuda/uploader.h from a memfd's mapping, by pages and by the size of matrices
//   pin     cudaHostAlloc beside touching in parallel and registering, as the store and a rank do
//
// A line an item on stderr, one JSON object on stdout. "fresh" is a mapping that nothing has
// touched, over memory that is there; "faulted" is the same mapping once more. GB are 10^9 bytes.
// What does not begin within --seconds is left out, and named.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "common/result.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/uploader.h"
#include "kernels/cuda/waiter.h"
#include "kvstore/internal/host_memory.h"

namespace foretoken::kernels::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kGiB = std::size_t{1} << 30;
constexpr int kMaxThreads = 16;

double seconds_of(const std::function<void()>& body) {
  const auto start = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double gb_s(std::size_t bytes, double seconds) {
  return static_cast<double>(bytes) / seconds / 1e9;
}

// Throws what the last one threw that did.
void on_threads(int num_threads, const std::function<void(int thread)>& body) {
  std::mutex mutex;
  std::exception_ptr failure;  // guarded by mutex
  {
    std::vector<std::jthread> threads;
    threads.reserve(static_cast<std::size_t>(num_threads));
    for (int i = 0; i < num_threads; ++i) {
      threads.emplace_back([&, i] {
        try {
          body(i);
        } catch (...) {
          const std::lock_guard lock(mutex);
          failure = std::current_exception();
        }
      });
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// Calls body with offsets 0, step, ... below bytes, and the thread that took it.
void in_pieces(int num_threads, std::size_t bytes, std::size_t step,
               const std::function<void(std::size_t at, int thread)>& body) {
  std::atomic<std::size_t> next{0};
  on_threads(num_threads, [&](int thread) {
    for (std::size_t at = 0; (at = next.fetch_add(step)) < bytes;) body(at, thread);
  });
}

class Report {
 public:
  explicit Report(std::chrono::seconds limit) : deadline_(Clock::now() + limit) {}

  // Measures, if there is time: `what` with the figures that `body` returns, or why there are none.
  void item(const std::string& what, const std::function<nlohmann::json()>& body) {
    nlohmann::json figures;
    try {
      figures = Clock::now() > deadline_ ? nlohmann::json{{"left_out", "no time"}} : body();
    } catch (const std::exception& failure) {
      figures = {{"failed", failure.what()}};
    }
    std::cerr << what << ": " << figures.dump() << '\n';
    figures["what"] = what;
    items_.push_back(std::move(figures));
  }
  const nlohmann::json& items() const { return items_; }

 private:
  Clock::time_point deadline_;
  nlohmann::json items_ = nlohmann::json::array();
};

enum class Pages { kSmall, kHuge };
std::string name_of(Pages pages) { return pages == Pages::kHuge ? "huge pages" : "4K pages"; }

// Of a mapping, before it is touched. Huge pages are what kvstore::populate() gets.
void advise(std::byte* base, std::size_t bytes, Pages pages) {
  if (pages == Pages::kSmall) madvise(base, bytes, MADV_NOHUGEPAGE);
}

// Of which a mapping's page table has huge pages.
std::size_t huge_mib(const std::byte* base) {
  std::ifstream smaps("/proc/self/smaps");
  char begin[32];
  std::snprintf(begin, sizeof begin, "%lx-", reinterpret_cast<unsigned long>(base));
  std::size_t kib = 0;
  bool ours = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.find('-') < line.find(' ')) ours = line.starts_with(begin);
    for (const char* field : {"ShmemPmdMapped:", "FilePmdMapped:"}) {
      if (ours && line.starts_with(field)) kib += std::stoul(line.substr(strlen(field)));
    }
  }
  return kib / 1024;
}

// Memory that processes share, backed by these pages.
struct SharedMemory {
  SharedMemory(std::size_t size, Pages pages, int num_threads)
      : bytes(size),
        memory(kvstore::make_shared_memory("upload-bench", size).value_or_throw()),
        mapping(kvstore::SharedMapping::map(memory.get(), 0, size).value_or_throw()) {
    advise(mapping.base(), bytes, pages);
    std::atomic<bool> done{true};
    in_pieces(num_threads, bytes, kPiece, [&](std::size_t at, int) {
      if (!kvstore::populate(mapping.base() + at, std::min(kPiece, bytes - at))) done = false;
    });
    if (!done) throw Exception(ErrorCode::kExhausted, "no memory to touch");
  }
  static constexpr std::size_t kPiece = 16 * kMiB;  // the arena's, of eight heads
  std::size_t bytes;
  kvstore::FileDescriptor memory;
  kvstore::SharedMapping mapping;
};

// As the reader of safetensors files maps the store's copy of the weights.
class ReadMapping {
 public:
  explicit ReadMapping(const SharedMemory& of) : bytes_(of.bytes) {
    void* mapped = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, of.memory.get(), 0);
    if (mapped == MAP_FAILED)
      throw Exception(ErrorCode::kIo, std::string("mmap: ") + strerror(errno));
    base_ = static_cast<std::byte*>(mapped);
  }
  ~ReadMapping() { munmap(base_, bytes_); }
  ReadMapping(const ReadMapping&) = delete;
  ReadMapping& operator=(const ReadMapping&) = delete;
  std::byte* base() const { return base_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { FT_CUDA(cudaMalloc(&data_, bytes)); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

void bench_link(Report& report, const DeviceMemory& device) {
  void* host = nullptr;
  FT_CUDA(cudaHostAlloc(&host, kGiB, cudaHostAllocDefault));
  std::memset(host, 1, kGiB);
  report.item("link: 1 GiB of pinned memory to the device", [&]() -> nlohmann::json {
    double best = 1e9;
    for (int run = 0; run < 5; ++run) {
      best = std::min(best, seconds_of([&] {
                        FT_CUDA(cudaMemcpyAsync(device.data(), host, kGiB, cudaMemcpyHostToDevice));
                        Waiter().wait_for(cudaStream_t{nullptr});
                      }));
    }
    return {{"gb_s", gb_s(kGiB, best)}};
  });
  cudaFreeHost(host);
}

nlohmann::json upload(Uploader& uploader, const DeviceMemory& device, const ReadMapping& from,
                      std::size_t matrix_bytes) {
  constexpr std::size_t kRow = 8192;
  const double seconds = seconds_of([&] {
    for (std::size_t at = 0; at < from.bytes(); at += matrix_bytes) {
      uploader.upload(device.data() + at, {from.base() + at, matrix_bytes / kRow, kRow, kRow});
    }
    uploader.finish();
  });
  return {{"gb_s", gb_s(from.bytes(), seconds)}};
}

void bench_upload(Report& report, const DeviceMemory& device, std::size_t bytes, Pages pages) {
  const SharedMemory memory(bytes, pages, kMaxThreads);
  std::memset(memory.mapping.base(), 0x5A, bytes);
  Uploader uploader(0);
  const auto run = [&](const std::string& what, const ReadMapping& from, std::size_t matrix_bytes) {
    report.item("upload: " + name_of(pages) + ", " + what,
                [&] { return upload(uploader, device, from, matrix_bytes); });
  };
  for (const std::size_t matrix_bytes : {64 * kMiB, 8 * kMiB, bytes}) {
    const ReadMapping mapping(memory);
    const std::string what = "matrices of " + std::to_string(matrix_bytes / kMiB) + " MiB, ";
    run(what + "fresh", mapping, matrix_bytes);
    run(what + "faulted", mapping, matrix_bytes);
  }
}

// In pieces of 1 GiB, as a rank registers its stripes.
void register_pieces(std::byte* host, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kGiB) {
    FT_CUDA(cudaHostRegister(host + at, std::min(kGiB, bytes - at),
                             cudaHostRegisterMapped | cudaHostRegisterPortable));
  }
}
void unregister_pieces(std::byte* host, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kGiB) FT_CUDA(cudaHostUnregister(host + at));
}

void bench_pinning(Report& report, Pages pages, int num_threads, std::size_t bytes) {
  const std::string what =
      "pin: memfd, " + name_of(pages) + ", touched by " + std::to_string(num_threads) + ", ";
  report.item(what + "registered from a mapping of its own", [&]() -> nlohmann::json {
    std::unique_ptr<SharedMemory> memory;
    const double touching =
        seconds_of([&] { memory = std::make_unique<SharedMemory>(bytes, pages, num_threads); });
    const auto rank = kvstore::SharedMapping::map(memory->memory.get(), 0, bytes).value_or_throw();
    const double registering = seconds_of([&] { register_pieces(rank.base(), bytes); });
    const std::size_t huge = huge_mib(rank.base());
    unregister_pieces(rank.base(), bytes);
    return {{"touch_s", touching},
            {"register_s", registering},
            {"sum_s", touching + registering},
            {"huge_mib", huge}};
  });
}

void bench_pin(Report& report, std::size_t bytes) {
  for (int round = 0; round < 2; ++round) {
    report.item("pin: cudaHostAlloc", [&]() -> nlohmann::json {
      void* host = nullptr;
      const double seconds = seconds_of([&] {
        FT_CUDA(cudaHostAlloc(&host, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
      });
      cudaFreeHost(host);
      return {{"seconds", seconds}};
    });
    for (const Pages pages : {Pages::kHuge, Pages::kSmall}) {
      bench_pinning(report, pages, kMaxThreads, bytes);
      bench_pinning(report, pages, kMaxThreads / 2, bytes);
    }
  }
}

// What a figure may depend on.
nlohmann::json machine() {
  std::string shmem;
  std::ifstream shmem_file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  std::getline(shmem_file, shmem);
  cudaDeviceProp properties{};
  FT_CUDA(cudaGetDeviceProperties(&properties, 0));
  return {{"gpu", properties.name},
          {"cores", std::thread::hardware_concurrency()},
          {"shmem_enabled", shmem}};
}

struct Options {
  std::vector<std::string> parts = {"link", "upload", "pin"};
  std::size_t gib = 4;
  std::size_t pin_gib = 8;
  int seconds = 60;
};

void run(const Options& options) {
  const auto wants = [&](const char* part) {
    return std::ranges::find(options.parts, part) != options.parts.end();
  };
  Report report{std::chrono::seconds(options.seconds)};
  report.item("machine", machine);
  if (wants("pin")) bench_pin(report, options.pin_gib * kGiB);
  const DeviceMemory device(options.gib * kGiB);
  if (wants("link")) bench_link(report, device);
  if (wants("upload")) {
    for (const Pages pages : {Pages::kHuge, Pages::kSmall}) {
      bench_upload(report, device, options.gib * kGiB, pages);
    }
  }
  std::cout << nlohmann::json{{"items", report.items()}}.dump(1) << '\n';
}

}  // namespace
}  // namespace foretoken::kernels::cuda

int main(int argc, char** argv) {
  using namespace foretoken;
  try {
    kernels::cuda::Options options;
    CLI::App app(
        "The way of kept weights to a GPU, and of an arena to pinned memory, by its causes");
    app.add_option("--parts", options.parts, "Of link, upload, pin")->delimiter(',');
    app.add_option("--gib", options.gib, "GiB that are uploaded");
    app.add_option("--pin-gib", options.pin_gib, "GiB that are pinned");
    app.add_option("--seconds", options.seconds, "Begin nothing after this");
    CLI11_PARSE(app, argc, argv);
    kernels::cuda::run(options);
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "upload_bench: %s\n", failure.what());
    return 1;
  }
  return 0;
}
