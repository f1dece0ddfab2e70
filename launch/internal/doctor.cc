#include "launch/internal/doctor.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <spdlog/fmt/fmt.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "common/available_memory.h"
#include "launch/internal/files.h"
#include "launch/internal/gpu_findings.h"
#include "launch/internal/machine.h"

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;

constexpr double kGib = 1 << 30;

// A program's first line of output; empty when it can't be run.
std::string first_line_of(const std::string& command) {
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return "";
  std::array<char, 16384> line{};
  const bool read = std::fgets(line.data(), line.size(), pipe) != nullptr;
  const bool ended_well = pclose(pipe) == 0;
  if (!read || !ended_well) return "";
  const std::string text = line.data();
  return text.substr(0, text.find('\n'));
}

Finding check_cpu() {
  std::string found;
  for (const char* flag : {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16"}) {
    if (cpu_has(flag)) found += (found.empty() ? "" : ", ") + std::string(flag);
  }
  const bool enough = cpu_has("avx2") && cpu_has("fma") && cpu_has("f16c");
  return finding(enough ? Health::kOk : Health::kFail, "CPU features",
                 found.empty() ? "none that count" : found,
                 "the CPU device needs AVX2, FMA and F16C: take a machine of 2013 or later");
}

Finding check_cores() {
  const int cores = num_usable_cores();
  return finding(cores >= 2 ? Health::kOk : Health::kWarn, "cores",
                 fmt::format("{} usable of {}", cores, sysconf(_SC_NPROCESSORS_ONLN)),
                 "one core serves, slowly: allow more (taskset, cgroup, sbatch --cpus-per-task)");
}

Finding check_memory() {
  const double gib = static_cast<double>(host_memory()) / kGib;
  const double free_gib = static_cast<double>(available_host_memory()) / kGib;
  return finding(gib >= 3.5 ? Health::kOk : Health::kWarn, "memory",
                 fmt::format("{:.1f} GiB, {:.1f} of them available", gib, free_gib),
                 "below 4 GiB only short contexts fit; lower --kv-host-gib and --max-model-len");
}

// The limit's number says little: with CAP_IPC_LOCK it does not hold. So it is tried.
Finding check_memory_lock() {
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool locked = memory != MAP_FAILED && mlock(memory, kBytes) == 0;
  if (memory != MAP_FAILED) munmap(memory, kBytes);
  return finding(locked ? Health::kOk : Health::kWarn, "memory lock",
                 locked ? "64 MiB could be locked" : "64 MiB could not be locked",
                 "a GPU pins the KV store's memory: raise memlock (ulimit -l unlimited)");
}

Finding check_mpi() {
  const std::string version = first_line_of("mpirun --version");
  const bool open_mpi = version.find("Open MPI") != std::string::npos;
  const Health health = version.empty() ? Health::kFail : (open_mpi ? Health::kOk : Health::kWarn);
  return finding(health, "MPI", version.empty() ? "no mpirun" : version,
                 "tried with Open MPI 4.1: bash launch/setup.sh, or module load openmpi");
}

Finding check_runtime_folder() {
  try {
    const RuntimeFolder folder;
    return finding(Health::kOk, "runtime folder", folder.path().parent_path().string(), "");
  } catch (const Exception& error) {
    return finding(Health::kFail, "runtime folder", error.what(),
                   "set TMPDIR to a folder of yours");
  }
}

Finding check_port(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int reuse = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof reuse);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const bool bound = bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  close(fd);
  return finding(bound ? Health::kOk : Health::kWarn, "port",
                 fmt::format("{} is {}", port, bound ? "free" : "in use"),
                 "serve with another --port, or --port 0 for any free one");
}

Finding check_disk() {
  std::error_code error;
  const fs::path folder = fs::temp_directory_path(error);
  const fs::space_info space = error ? fs::space_info{} : fs::space(folder, error);
  const double gib = error ? 0 : static_cast<double>(space.available) / kGib;
  return finding(gib >= 2 ? Health::kOk : Health::kWarn, "disk",
                 error ? "no temporary folder: " + error.message()
                       : fmt::format("{:.1f} GiB free in {}", gib, folder.string()),
                 "a model fetch takes 1 GiB; free some, or set TMPDIR and FORETOKEN_MODELS");
}

// What the NVMe tier reads with.
Finding check_direct_io() {
  std::error_code error;
  std::string name = (fs::temp_directory_path(error) / "foretoken-direct-XXXXXX").string();
  const int probe = error ? -1 : mkostemp(name.data(), O_DIRECT | O_CLOEXEC);
  if (probe >= 0) {
    close(probe);
    unlink(name.c_str());
  }
  return finding(probe >= 0 ? Health::kOk : Health::kWarn, "direct I/O",
                 probe >= 0 ? "O_DIRECT opens" : "no O_DIRECT in the temporary folder",
                 "an NVMe tier needs a folder on a local disk (ext4, xfs)");
}

Finding check_python() {
  const std::string python = python_program();
  const std::string version =
      first_line_of("'" + python + "' -c 'import sys, gguf; print(sys.version.split()[0])'");
  return finding(version.empty() ? Health::kWarn : Health::kOk, "Python",
                 version.empty() ? python + " has no gguf" : version + " with gguf, " + python,
                 "`model fetch` and `model import` need it: bash launch/setup.sh");
}

bool has_library(const char* name) {
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  dlclose(library);
  return true;
}

// The worker's program looks at the devices: this command links no CUDA.
std::vector<Finding> check_gpus() {
  if (!has_library("libcuda.so.1")) {
    return {finding(Health::kOk, "GPU driver", "none: --device auto takes the CPU", "")};
  }
  const std::string answer = first_line_of(
      fmt::format("'{}' --probe-devices", sibling_program("foretoken-worker").string()));
  const auto json = nlohmann::json::parse(answer, nullptr, false);
  if (json.is_discarded()) {
    return {finding(Health::kFail, "GPUs", "foretoken-worker can't look at them",
                    "run foretoken-worker --probe-devices and see what it says")};
  }
  return describe_gpus(json, "/");
}

}  // namespace

Finding finding(Health health, std::string what, std::string found, std::string fix) {
  if (health == Health::kOk) fix.clear();
  return {health, std::move(what), std::move(found), std::move(fix)};
}

std::string_view name_of(Health health) {
  switch (health) {
    case Health::kOk:
      return "ok";
    case Health::kWarn:
      return "warn";
    case Health::kFail:
      return "fail";
  }
  return "";
}

std::vector<Finding> examine_machine(int port) {
  std::vector<Finding> found = {check_cpu(),         check_cores(), check_memory(),
                                check_memory_lock(), check_mpi(),   check_runtime_folder(),
                                check_port(port),    check_disk(),  check_direct_io(),
                                check_python()};
  for (Finding& gpu : check_gpus()) found.push_back(std::move(gpu));
  return found;
}

}  // namespace foretoken::launch
