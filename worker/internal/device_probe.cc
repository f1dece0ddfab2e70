#include "worker/device_probe.h"

#include <chrono>
#include <nlohmann/json.hpp>

#include "common/result.h"
#include "kernels/device.h"
#include "worker/collective.h"
#include "worker/pinned.h"

namespace foretoken::worker {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kLinkBytes = std::size_t{256} << 20;

// Bytes a second of `copy`, which moves kLinkBytes; the second run counts.
template <typename Copy>
double link_speed(kernels::Stream& stream, const Copy& copy) {
  double seconds = 1;
  for (int run = 0; run < 2; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    copy();
    stream.synchronize();
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  return static_cast<double>(kLinkBytes) / seconds;
}

Json probe(int index) {
  const auto device = kernels::make_cuda_device({.index = index});
  const auto stream = device->make_stream(kernels::StreamKind::kCompute);
  const kernels::DeviceBuffer memory(*device, kLinkBytes, kernels::MemoryUse::kActivations);
  const PinnedArray<std::byte> host(*device, kLinkBytes);
  const kernels::DeviceInfo info = device->info();
  const double in = link_speed(
      *stream, [&] { device->copy_in(memory.data(), host.data(), kLinkBytes, *stream); });
  const double out = link_speed(
      *stream, [&] { device->copy_out(host.data(), memory.data(), kLinkBytes, *stream); });
  return {{"index", index},
          {"name", info.name},
          {"memory_bytes", info.memory_bytes},
          {"compute_units", info.compute_units},
          {"to_device_bytes_per_s", in},
          {"from_device_bytes_per_s", out}};
}

}  // namespace

std::string probe_devices() {
  Json json = {{"nccl", nccl_version()}, {"devices", Json::array()}};
  for (int index = 0; index < kernels::num_cuda_devices(); ++index) {
    try {
      json["devices"].push_back(probe(index));
    } catch (const Exception& failure) {
      json["devices"].push_back({{"index", index}, {"error", failure.what()}});
    }
  }
  return json.dump();
}

}  // namespace foretoken::worker
