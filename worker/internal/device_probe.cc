#include "worker/device_probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/available_memory.h"
#include "common/result.h"
#include "kernels/cuda_machine.h"
#include "kernels/device.h"
#include "worker/collective.h"
#include "worker/internal/nccl_versions.h"
#include "worker/pinned.h"

namespace foretoken::worker {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kLinkBytes = std::size_t{256} << 20;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Bytes a second of `copy`, which moves kLinkBytes; the second run counts.
template <typename Copy>
double link_speed(kernels::Stream& stream, const Copy& copy) {
  double seconds = 1;
  for (int run = 0; run < 2; ++run) {
    const auto begin = Clock::now();
    copy();
    stream.synchronize();
    seconds = seconds_since(begin);
  }
  return static_cast<double>(kLinkBytes) / seconds;
}

// Memory as the KV arena's: there first, then registered with the device.
class Registered {
 public:
  // Throws Exception(kDevice) when it can't be pinned, or isn't there.
  Registered(kernels::Device& device, std::size_t bytes) : device_(device), bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      throw Exception(ErrorCode::kDevice, std::string("mmap: ") + std::strerror(errno));
    }
    madvise(memory, bytes, MADV_HUGEPAGE);
    memory_ = static_cast<std::byte*>(memory);
    try {
      device_.register_host(memory_, bytes_);
    } catch (const Exception&) {
      munmap(memory_, bytes_);
      throw;
    }
  }
  ~Registered() {
    device_.unregister_host(memory_);
    munmap(memory_, bytes_);
  }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;

 private:
  kernels::Device& device_;
  std::size_t bytes_;
  std::byte* memory_ = nullptr;
};

// Pins memory step by step until it is as much as is wanted, can't be more, or takes too long.
Json try_to_pin(kernels::Device& device) {
  constexpr std::size_t kStepBytes = std::size_t{256} << 20;
  constexpr std::size_t kMostBytes = std::size_t{4} << 30;
  constexpr double kMostSeconds = 2;
  const std::size_t wanted = std::min<std::size_t>(kMostBytes, available_host_memory() / 4);
  const auto begin = Clock::now();
  std::vector<std::unique_ptr<Registered>> pieces;
  std::size_t pinned = 0;
  std::string error;
  try {
    while (pinned < wanted && seconds_since(begin) < kMostSeconds) {
      const std::size_t bytes = std::min(kStepBytes, wanted - pinned);
      pieces.push_back(std::make_unique<Registered>(device, bytes));
      pinned += bytes;
    }
  } catch (const Exception& failure) {
    error = failure.what();
  }
  return {{"bytes", pinned},
          {"wanted_bytes", wanted},
          {"seconds", seconds_since(begin)},
          {"error", error}};
}

Json probe(kernels::Device& device, int index) {
  const auto stream = device.make_stream(kernels::StreamKind::kCompute);
  const kernels::DeviceBuffer memory(device, kLinkBytes, kernels::MemoryUse::kActivations);
  const PinnedArray<std::byte> host(device, kLinkBytes);
  const kernels::DeviceInfo info = device.info();
  const double in =
      link_speed(*stream, [&] { device.copy_in(memory.data(), host.data(), kLinkBytes, *stream); });
  const double out = link_speed(
      *stream, [&] { device.copy_out(host.data(), memory.data(), kLinkBytes, *stream); });
  return {{"index", index},
          {"name", info.name},
          {"pci_address", kernels::cuda_pci_address(index)},
          {"memory_bytes", info.memory_bytes},
          {"compute_units", info.compute_units},
          {"to_device_bytes_per_s", in},
          {"from_device_bytes_per_s", out}};
}

Json probe_link(int from, int to) {
  const kernels::PeerLink link = kernels::measure_peer_link(from, to);
  return {{"from", from},
          {"to", to},
          {"reached", link.is_reached},
          {"rank", link.rank},
          {"bytes_per_s", link.bytes_per_s},
          {"seconds", link.seconds}};
}

// What `ask` answers; where it throws, `names` with the error.
template <typename Ask>
Json answer_or_error(Json names, const Ask& ask) {
  try {
    return ask();
  } catch (const Exception& failure) {
    names["error"] = failure.what();
    return names;
  }
}

Json describe_cuda() {
  const kernels::CudaVersions versions = kernels::cuda_versions();
  if (versions.program == 0) return nullptr;
  const bool is_loaded = versions.driver > 0;
  Json json = {{"driver", nullptr},
               {"program", kernels::cuda_version_name(versions.program)},
               {"too_old", is_loaded ? kernels::why_driver_is_too_old(versions) : ""}};
  if (is_loaded) json["driver"] = kernels::cuda_version_name(versions.driver);
  return json;
}

Json describe_nccl() {
  const NcclVersions versions = nccl_versions();
  if (versions.built == 0) return nullptr;
  return {{"loaded", nccl_version_name(versions.loaded)},
          {"built", nccl_version_name(versions.built)},
          {"too_old", why_nccl_is_too_old(versions.loaded, versions.built)}};
}

}  // namespace

std::string probe_devices() {
  const int count = kernels::num_cuda_devices();
  Json json = {{"cuda", describe_cuda()},
               {"nccl", answer_or_error(Json::object(), describe_nccl)},
               {"why_none", count == 0 ? kernels::why_no_cuda_device() : ""},
               {"devices", Json::array()},
               {"links", Json::array()},
               {"pinned", nullptr}};
  for (int index = 0; index < count; ++index) {
    json["devices"].push_back(answer_or_error({{"index", index}}, [&] {
      const auto device = kernels::make_cuda_device({.index = index});
      if (json["pinned"].is_null()) json["pinned"] = try_to_pin(*device);
      return probe(*device, index);
    }));
  }
  for (int from = 0; from < count; ++from) {
    for (int to = from + 1; to < count; ++to) {
      json["links"].push_back(
          answer_or_error({{"from", from}, {"to", to}}, [&] { return probe_link(from, to); }));
    }
  }
  return json.dump();
}

}  // namespace foretoken::worker
