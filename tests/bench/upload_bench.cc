// What bounds the way of kept weights to a GPU, and what pinning a large arena costs.
//
//   upload_bench [--parts link,upload,fill,lanes,pin] [--gib 4] [--pin-gib 8] [--seconds 60]
//
//   link    pinned memory to the device: the most there is
//   upload  kernels/cuda/uploader.h from a memfd's mapping, by pages and by the size of matrices
//   fill    threads that only copy to pinned buffers, without a device
//   lanes   the same, and the copy engine empties the buffers; nothing drains before the end
//   pin     cudaHostAlloc beside touching in parallel and registering
//
// A line an item on stderr, one JSON object on stdout. "fresh" is a mapping that nothing has
// touched, over memory that is there; "faulted" is the same mapping once more. GB are 10^9 bytes.
// What does not begin within --seconds is left out, and named.
#include <cuda_runtime_api.h>
#include <immintrin.h>
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
constexpr std::size_t kMaxChunk = 4 * kMiB;
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

class Mapping {
 public:
  // fd -1: private memory of its own.
  Mapping(int fd, std::size_t bytes, int protection) : bytes_(bytes) {
    const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void* mapped = mmap(nullptr, bytes, protection, flags, fd, 0);
    if (mapped == MAP_FAILED)
      throw Exception(ErrorCode::kIo, std::string("mmap: ") + strerror(errno));
    base_ = static_cast<std::byte*>(mapped);
  }
  ~Mapping() { munmap(base_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::byte* base() const { return base_; }

  void advise(Pages pages) const {  // before it is touched
    if (pages == Pages::kHuge) return kvstore::prefer_huge_pages(base_, bytes_);
    madvise(base_, bytes_, MADV_NOHUGEPAGE);
  }
  // Of which the kernel has huge pages in the page table.
  std::size_t huge_mib() const {
    std::ifstream smaps("/proc/self/smaps");
    char begin[32];
    std::snprintf(begin, sizeof begin, "%lx-", reinterpret_cast<unsigned long>(base_));
    std::size_t kib = 0;
    bool ours = false;
    for (std::string line; std::getline(smaps, line);) {
      if (line.find('-') < line.find(' ')) ours = line.starts_with(begin);
      for (const char* field : {"AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"}) {
        if (ours && line.starts_with(field)) kib += std::stoul(line.substr(strlen(field)));
      }
    }
    return kib / 1024;
  }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_;
};

bool touch(const Mapping& mapping, std::size_t bytes, int num_threads) {
  std::atomic<bool> done{true};
  in_pieces(num_threads, bytes, 128 * kMiB, [&](std::size_t at, int) {
    if (!kvstore::populate(mapping.base() + at, std::min(128 * kMiB, bytes - at))) done = false;
  });
  return done;
}

// A memfd as the store's copy of the weights, full of bytes that aren't zero.
struct Source {
  Source(std::size_t size, Pages kind)
      : bytes(size),
        pages(kind),
        memory(kvstore::make_shared_memory("upload-bench", size).value_or_throw()) {
    const Mapping mapping(memory.get(), bytes, PROT_READ | PROT_WRITE);
    mapping.advise(pages);
    in_pieces(kMaxThreads, bytes, 16 * kMiB, [&](std::size_t at, int) {
      std::memset(mapping.base() + at, 0x5A, std::min(16 * kMiB, bytes - at));
    });
  }
  // As the reader of safetensors files maps it: without advice.
  std::unique_ptr<Mapping> map() const {
    return std::make_unique<Mapping>(memory.get(), bytes, PROT_READ);
  }
  std::size_t bytes;
  Pages pages;
  kvstore::FileDescriptor memory;
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

// ---- upload: the program's own way ----

nlohmann::json upload(Uploader& uploader, const DeviceMemory& device, const Mapping& mapping,
                      std::size_t bytes, std::size_t matrix_bytes) {
  constexpr std::size_t kRow = 8192;
  const double seconds = seconds_of([&] {
    for (std::size_t at = 0; at < bytes; at += matrix_bytes) {
      uploader.upload(device.data() + at, {mapping.base() + at, matrix_bytes / kRow, kRow, kRow});
    }
  });
  return {{"gb_s", gb_s(bytes, seconds)}, {"huge_mib", mapping.huge_mib()}};
}

void bench_upload(Report& report, const DeviceMemory& device, const Source& source) {
  std::unique_ptr<Uploader> uploader;
  const std::string of = "upload: " + name_of(source.pages) + ", ";
  report.item(of + "making the uploader", [&]() -> nlohmann::json {
    return {{"seconds", seconds_of([&] { uploader = std::make_unique<Uploader>(0); })}};
  });
  if (!uploader) return;
  const auto mapping = source.map();
  const auto run = [&](const std::string& what, const Mapping& from, std::size_t matrix_bytes) {
    report.item(of + what,
                [&] { return upload(*uploader, device, from, source.bytes, matrix_bytes); });
  };
  run("matrices of 64 MiB, fresh", *mapping, 64 * kMiB);
  run("matrices of 64 MiB, faulted", *mapping, 64 * kMiB);
  run("matrices of 8 MiB, faulted", *mapping, 8 * kMiB);
  run("one matrix, faulted", *mapping, source.bytes);
  const auto advised = source.map();
  advised->advise(Pages::kHuge);
  run("matrices of 64 MiB, fresh, MADV_HUGEPAGE", *advised, 64 * kMiB);
}

// ---- fill and lanes: other ways ----

enum class Fill { kCopy, kPopulateAndCopy, kRead, kStream, kRepMovsb };
std::string name_of(Fill fill) {
  switch (fill) {
    case Fill::kCopy:
      return "memcpy";
    case Fill::kPopulateAndCopy:
      return "MADV_POPULATE_READ, memcpy";
    case Fill::kRead:
      return "pread";
    case Fill::kStream:
      return "streaming stores";
    case Fill::kRepMovsb:
      return "rep movsb";
  }
  return {};
}

// REQUIRES: bytes a multiple of 128, both 32-byte aligned; the processor has AVX2.
__attribute__((target("avx2"))) void stream_copy(std::byte* to, const std::byte* from,
                                                 std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 128) {
    const auto* in = reinterpret_cast<const __m256i*>(from + at);
    auto* out = reinterpret_cast<__m256i*>(to + at);
    const __m256i a = _mm256_load_si256(in);
    const __m256i b = _mm256_load_si256(in + 1);
    const __m256i c = _mm256_load_si256(in + 2);
    const __m256i d = _mm256_load_si256(in + 3);
    _mm256_stream_si256(out, a);
    _mm256_stream_si256(out + 1, b);
    _mm256_stream_si256(out + 2, c);
    _mm256_stream_si256(out + 3, d);
  }
  _mm_sfence();  // before the copy engine reads them
}

void rep_movsb(std::byte* to, const std::byte* from, std::size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

// A thread's stream and pinned buffers, and what it spent.
class Lane {
 public:
  Lane() {
    FT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (Buffer& buffer : buffers_) {
      FT_CUDA(cudaHostAlloc(&buffer.host, kMaxChunk, cudaHostAllocDefault));
      FT_CUDA(cudaEventCreateWithFlags(&buffer.emptied, cudaEventDisableTiming));
    }
  }
  ~Lane() {
    for (const Buffer& buffer : buffers_) {
      cudaFreeHost(buffer.host);
      cudaEventDestroy(buffer.emptied);
    }
    cudaStreamDestroy(stream_);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void fill(Fill how, const Source& source, std::byte* from, std::size_t at, std::size_t bytes) {
    next_ = (next_ + 1) % buffers_.size();
    auto* to = static_cast<std::byte*>(buffers_[next_].host);
    if (how == Fill::kStream) return stream_copy(to, from + at, bytes);
    if (how == Fill::kRepMovsb) return rep_movsb(to, from + at, bytes);
    if (how == Fill::kRead) {
      if (pread(source.memory.get(), to, bytes, static_cast<off_t>(at)) !=
          static_cast<ssize_t>(bytes)) {
        throw Exception(ErrorCode::kIo, "a short pread");
      }
      return;
    }
    if (how == Fill::kPopulateAndCopy && madvise(from + at, bytes, MADV_POPULATE_READ) != 0) {
      throw Exception(ErrorCode::kIo, std::string("MADV_POPULATE_READ: ") + strerror(errno));
    }
    std::memcpy(to, from + at, bytes);
  }
  void send(std::byte* device, std::size_t bytes) {  // what fill() has brought
    const Buffer& buffer = buffers_[next_];
    FT_CUDA(cudaMemcpyAsync(device, buffer.host, bytes, cudaMemcpyHostToDevice, stream_));
    FT_CUDA(cudaEventRecord(buffer.emptied, stream_));
  }
  void wait_for_next() const { Waiter().wait_for(buffers_[(next_ + 1) % buffers_.size()].emptied); }
  void finish() const { Waiter().wait_for(stream_); }

 private:
  struct Buffer {
    void* host = nullptr;
    cudaEvent_t emptied = nullptr;
  };
  cudaStream_t stream_ = nullptr;
  std::vector<Buffer> buffers_{2};
  std::size_t next_ = 0;
};

using Lanes = std::vector<std::unique_ptr<Lane>>;

struct Way {
  Fill fill = Fill::kCopy;
  int num_threads = 8;
  std::size_t chunk_bytes = kMaxChunk;
};

// The rate, and the share of the threads' time in filling buffers; the rest of it waits for the
// copy engine. device null: only fills.
nlohmann::json run_way(const Lanes& lanes, const Way& way, const Source& source,
                       const Mapping& mapping, std::byte* device) {
  std::vector<double> filling(kMaxThreads);
  const double seconds = seconds_of([&] {
    in_pieces(way.num_threads, source.bytes, way.chunk_bytes, [&](std::size_t at, int thread) {
      const auto index = static_cast<std::size_t>(thread);
      Lane& lane = *lanes[index];
      if (device != nullptr) lane.wait_for_next();
      filling[index] +=
          seconds_of([&] { lane.fill(way.fill, source, mapping.base(), at, way.chunk_bytes); });
      if (device != nullptr) lane.send(device + at, way.chunk_bytes);
    });
    for (const auto& lane : lanes) lane->finish();
  });
  double sum = 0;
  for (const double one : filling) sum += one;
  return {{"gb_s", gb_s(source.bytes, seconds)}, {"filling", sum / seconds / way.num_threads}};
}

void bench_way(Report& report, const Lanes& lanes, const Way& way, const Source& source,
               std::byte* device) {
  if (way.fill == Fill::kStream && __builtin_cpu_supports("avx2") == 0) return;
  const std::string what = (device == nullptr ? "fill: " : "lanes: ") + name_of(source.pages) +
                           ", " + name_of(way.fill) + ", " + std::to_string(way.num_threads) +
                           " threads, " + std::to_string(way.chunk_bytes / kMiB) + " MiB";
  report.item(what, [&]() -> nlohmann::json {
    const auto mapping = source.map();
    nlohmann::json fresh = run_way(lanes, way, source, *mapping, device);
    if (way.fill == Fill::kRead) return fresh;  // maps nothing
    const nlohmann::json faulted = run_way(lanes, way, source, *mapping, device);
    return {{"fresh", fresh}, {"faulted", faulted}};
  });
}

void bench_fill(Report& report, const Lanes& lanes, const Source& source) {
  for (const int num_threads : {4, 8, 16}) {
    for (const Fill fill : {Fill::kCopy, Fill::kRead, Fill::kStream, Fill::kRepMovsb}) {
      bench_way(report, lanes, {fill, num_threads}, source, nullptr);
    }
  }
}

void bench_lanes(Report& report, const Lanes& lanes, const Source& source, std::byte* device) {
  for (const int num_threads : {4, 8, 12, 16}) {
    for (const Fill fill : {Fill::kCopy, Fill::kPopulateAndCopy, Fill::kRead, Fill::kStream}) {
      bench_way(report, lanes, {fill, num_threads}, source, device);
    }
  }
  for (const std::size_t chunk : {kMiB, 2 * kMiB}) {
    for (const Fill fill : {Fill::kCopy, Fill::kRead, Fill::kStream}) {
      bench_way(report, lanes, {fill, 8, chunk}, source, device);
    }
  }
}

// ---- pin ----

// Registers pieces of 1 GiB from this many threads; 1: all at once.
void register_pieces(std::byte* host, std::size_t bytes, int num_threads) {
  in_pieces(num_threads, bytes, num_threads == 1 ? bytes : kGiB, [&](std::size_t at, int) {
    FT_CUDA(cudaSetDevice(0));
    FT_CUDA(cudaHostRegister(host + at, num_threads == 1 ? bytes : std::min(kGiB, bytes - at),
                             cudaHostRegisterMapped | cudaHostRegisterPortable));
  });
}

void unregister_pieces(std::byte* host, std::size_t bytes, int num_threads) {
  for (std::size_t at = 0; at < bytes; at += num_threads == 1 ? bytes : kGiB) {
    FT_CUDA(cudaHostUnregister(host + at));
  }
}

struct PinCase {
  bool is_memfd;
  Pages pages;
  int touching;     // threads
  int registering;  // threads
};

void bench_pinning(Report& report, const PinCase& pin, std::size_t bytes) {
  const std::string what =
      std::string("pin: ") + (pin.is_memfd ? "memfd, " : "private, ") + name_of(pin.pages) +
      ", touched by " + std::to_string(pin.touching) + ", registered " +
      (pin.registering == 1 ? "whole" : "by " + std::to_string(pin.registering));
  report.item(what, [&]() -> nlohmann::json {
    kvstore::FileDescriptor memory;
    if (pin.is_memfd) memory = kvstore::make_shared_memory("upload-bench", bytes).value_or_throw();
    const Mapping mapping(pin.is_memfd ? memory.get() : -1, bytes, PROT_READ | PROT_WRITE);
    mapping.advise(pin.pages);
    bool touched = false;
    const double touching = seconds_of([&] { touched = touch(mapping, bytes, pin.touching); });
    if (!touched) throw Exception(ErrorCode::kExhausted, "no memory to touch");
    const double registering =
        seconds_of([&] { register_pieces(mapping.base(), bytes, pin.registering); });
    const std::size_t huge_mib = mapping.huge_mib();
    unregister_pieces(mapping.base(), bytes, pin.registering);
    return {{"touch_s", touching},
            {"register_s", registering},
            {"sum_s", touching + registering},
            {"huge_mib", huge_mib}};
  });
}

void bench_pin(Report& report, std::size_t bytes) {
  report.item("pin: cudaHostAlloc", [&]() -> nlohmann::json {
    void* host = nullptr;
    const double seconds = seconds_of(
        [&] { FT_CUDA(cudaHostAlloc(&host, bytes, cudaHostAllocMapped | cudaHostAllocPortable)); });
    cudaFreeHost(host);
    return {{"seconds", seconds}};
  });
  for (const Pages pages : {Pages::kHuge, Pages::kSmall}) {
    bench_pinning(report, {true, pages, kMaxThreads, 1}, bytes);
    bench_pinning(report, {true, pages, kMaxThreads / 2, 8}, bytes);
  }
  bench_pinning(report, {false, Pages::kHuge, kMaxThreads, 1}, bytes);
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
  std::vector<std::string> parts = {"link", "upload", "pin", "fill", "lanes"};
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
  Lanes lanes;
  for (int i = 0; i < kMaxThreads; ++i) lanes.push_back(std::make_unique<Lane>());
  for (const Pages pages : {Pages::kHuge, Pages::kSmall}) {
    const Source source(options.gib * kGiB, pages);
    if (wants("upload")) bench_upload(report, device, source);
    if (wants("lanes")) bench_lanes(report, lanes, source, device.data());
    if (wants("fill")) bench_fill(report, lanes, source);
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
    app.add_option("--parts", options.parts, "Of link, upload, fill, lanes, pin")->delimiter(',');
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
