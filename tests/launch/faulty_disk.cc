// A disk that fails when it is told to, for `foretoken serve` and its children by LD_PRELOAD: in
// place of pread and pwrite for the NVMe tier's file. io_uring is not there, so that the tier uses
// them. FAULTY_DISK names a file of two words, read at each operation:
//
//   KIND PERCENT     eio: fails; short: moves half; stall: takes 5 s; slow: takes 0.1 s; of
//   PERCENT
//                    of the operations
//
// An empty file, or none: the disk works.
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>
#include <thread>

namespace {

enum class Fault { kNone, kError, kShort, kStall, kSlow };

bool is_tier(int file) {
  char path[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(file);
  const ssize_t length = readlink(link.c_str(), path, sizeof path);
  return length > 0 &&
         std::string_view(path, static_cast<std::size_t>(length)).ends_with("/kv-slabs");
}

// The same operations of a process in every run: its first, whatever the share, its second, ...
bool is_one_of(int percent) {
  static std::atomic<std::uint64_t> next{0};
  std::uint64_t x = next++ * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  return static_cast<int>((x ^ (x >> 31)) % 100) < percent;
}

Fault fault_of(int file) {
  const char* told = std::getenv("FAULTY_DISK");
  if (told == nullptr || !is_tier(file)) return Fault::kNone;
  std::ifstream words(told);
  std::string kind;
  int percent = 0;
  if (!(words >> kind >> percent) || !is_one_of(percent)) return Fault::kNone;
  if (kind == "eio") return Fault::kError;
  if (kind == "short") return Fault::kShort;
  return kind == "slow" ? Fault::kSlow : Fault::kStall;
}

template <typename Data>
ssize_t move(const char* name, int file, Data data, std::size_t bytes, off_t offset) {
  using Call = ssize_t (*)(int, Data, std::size_t, off_t);
  const auto call = reinterpret_cast<Call>(dlsym(RTLD_NEXT, name));
  switch (fault_of(file)) {
    case Fault::kNone:
      break;
    case Fault::kError:
      errno = EIO;
      return -1;
    case Fault::kShort:
      bytes = bytes > 4096 ? bytes / 2 / 4096 * 4096 : bytes / 2;  // whole sectors, for O_DIRECT
      break;
    case Fault::kStall:
      std::this_thread::sleep_for(std::chrono::seconds(5));
      break;
    case Fault::kSlow:
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  return call(file, data, bytes, offset);
}

}  // namespace

struct io_uring;
extern "C" {
int io_uring_queue_init(unsigned, io_uring*, unsigned) { return -ENOSYS; }
ssize_t pread(int file, void* data, std::size_t bytes, off_t offset) {
  return move("pread", file, data, bytes, offset);
}
ssize_t pwrite(int file, const void* data, std::size_t bytes, off_t offset) {
  return move("pwrite", file, data, bytes, offset);
}
}
