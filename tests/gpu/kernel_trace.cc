// What ran when, on a GPU: a library that the CUDA driver loads into a process, and that writes
// each kernel's and copy's begin and end, graphs' nodes included, to a file when the process ends.
//
//   CUDA_INJECTION64_PATH=libkernel_trace.so KERNEL_TRACE=FILE.csv PROGRAM
//
// A line: begin ns, end ns, stream, name. tests/gpu/timeline.py makes a step's timeline of it.
// Tracing costs about a microsecond a kernel, so the times of a whole step are for comparing its
// parts.
#include <cupti.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr std::size_t kBufferBytes = std::size_t{8} << 20;

struct Interval {
  std::uint64_t begin;
  std::uint64_t end;
  std::uint32_t stream;
  std::string name;
};

std::mutex mutex;
std::vector<Interval> intervals;  // guarded by mutex

void give_buffer(std::uint8_t** buffer, std::size_t* bytes, std::size_t* max_records) {
  *bytes = kBufferBytes;
  *max_records = 0;
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(8, kBufferBytes));
}

void keep(const CUpti_Activity& record) {
  if (record.kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
    const auto& kernel = reinterpret_cast<const CUpti_ActivityKernel9&>(record);
    intervals.push_back({kernel.start, kernel.end, kernel.streamId, kernel.name});
  } else if (record.kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
    const auto& copy = reinterpret_cast<const CUpti_ActivityMemcpy5&>(record);
    intervals.push_back({copy.start, copy.end, copy.streamId, "memcpy"});
  }
}

void take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
  {
    const std::lock_guard lock(mutex);
    CUpti_Activity* record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) keep(*record);
  }
  std::free(buffer);
}

void write_all() {
  cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  const std::lock_guard lock(mutex);
  if (intervals.empty()) return;  // mpirun looks for GPUs too
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  if (rank != nullptr && std::strcmp(rank, "0") != 0) return;  // one rank stands for all
  const char* path = std::getenv("KERNEL_TRACE");
  std::FILE* file = path == nullptr ? nullptr : std::fopen(path, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "kernel_trace: set KERNEL_TRACE to a file that can be written\n");
    return;
  }
  for (const Interval& i : intervals) {
    std::fprintf(file, "%llu,%llu,%u,%s\n", static_cast<unsigned long long>(i.begin),
                 static_cast<unsigned long long>(i.end), i.stream, i.name.c_str());
  }
  std::fclose(file);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
  const bool enabled =
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) == CUPTI_SUCCESS &&
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY) == CUPTI_SUCCESS;
  if (!enabled) std::fprintf(stderr, "kernel_trace: CUPTI could not be enabled\n");
  std::atexit(write_all);
  return 1;
}
