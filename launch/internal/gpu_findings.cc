#include "launch/internal/gpu_findings.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <string>

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr double kGib = 1 << 30;

std::string first_line(const fs::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

// Of the kernel's module, as 580.65.06; "" where it doesn't tell.
std::string driver_release(const fs::path& root) {
  const std::string line = first_line(root / "proc/driver/nvidia/version");
  std::smatch found;
  const bool is_there = std::regex_search(line, found, std::regex(R"(\s(\d+\.\d+(\.\d+)?)\s)"));
  return is_there ? found[1].str() : "";
}

Finding describe_driver(const Json& probe, const fs::path& root) {
  const std::string why_none = probe.at("why_none");
  const Json& driver = probe.at("cuda").at("driver");
  std::string found = driver_release(root);
  if (driver.is_string()) {
    found +=
        fmt::format("{}takes CUDA up to {}; this program needs {}", found.empty() ? "" : ", ",
                    driver.get<std::string>(), probe.at("cuda").at("program").get<std::string>());
  }
  if (why_none.empty()) return finding(Health::kOk, "GPU driver", found, "");
  if (!probe.at("cuda").at("too_old").get<std::string>().empty()) {
    return finding(Health::kFail, "GPU driver", found + ", so it is too old",
                   "update it, or serve with --device cpu");
  }
  return finding(Health::kWarn, "GPU driver", found.empty() ? "none is loaded" : found, why_none);
}

// One GPU does without it.
Finding describe_nccl(const Json& nccl, std::size_t num_gpus) {
  constexpr const char* kFix =
      "several GPUs need it: see LD_LIBRARY_PATH and LD_PRELOAD, or launch/bundle.sh --cuda";
  const Health if_bad = num_gpus > 1 ? Health::kFail : Health::kWarn;
  if (nccl.contains("error")) {
    return finding(if_bad, "NCCL", nccl["error"].get<std::string>(), kFix);
  }
  const std::string too_old = nccl.at("too_old");
  const std::string loaded = nccl.at("loaded");
  const std::string built = nccl.at("built");
  std::string found = loaded;
  if (loaded != built) found += fmt::format("; this program was built with {}", built);
  return finding(too_old.empty() ? Health::kOk : if_bad, "NCCL", too_old.empty() ? found : too_old,
                 kFix);
}

// Where the GPU's PCI slot is; "" where the machine does not tell.
std::string place_of(const Json& device, const fs::path& root) {
  const fs::path slot = root / "sys/bus/pci/devices" / device.at("pci_address").get<std::string>();
  const std::string node = first_line(slot / "numa_node");
  if (node.empty() || node == "-1") return "";
  return fmt::format(", NUMA node {}, CPUs {}", node, first_line(slot / "local_cpulist"));
}

Finding describe_gpu(const Json& device, const fs::path& root) {
  const std::string what = fmt::format("GPU {}", device.at("index").get<int>());
  if (device.contains("error")) {
    return finding(Health::kFail, what, device["error"].get<std::string>(),
                   "free or mend the device, or serve with --device cpu");
  }
  const double in = device.at("to_device_bytes_per_s").get<double>() / 1e9;
  const double out = device.at("from_device_bytes_per_s").get<double>() / 1e9;
  constexpr double kSlowLink = 20;  // GB/s: PCIe 4.0 x16 gives 25, 5.0 gives 53
  return finding(
      std::min(in, out) >= kSlowLink ? Health::kOk : Health::kWarn, what,
      fmt::format("{}, {:.0f} GiB, host link {:.0f} / {:.0f} GB/s in / out{}",
                  device.at("name").get<std::string>(),
                  device.at("memory_bytes").get<double>() / kGib, in, out, place_of(device, root)),
      "KV comes over this link: look for a narrow slot (nvidia-smi -q -d PCIE) or other load");
}

double speed_of(const Json& link) { return link.value("bytes_per_s", 0.0); }

Finding describe_bad_link(const Json& link) {
  const std::string what =
      fmt::format("GPUs {} - {}", link.at("from").get<int>(), link.at("to").get<int>());
  constexpr const char* kFix =
      "tensor-parallel ranks add up over it: see nvidia-smi topo -m, and the fabric manager's log";
  if (link.contains("error")) {
    return finding(Health::kWarn, what, link["error"].get<std::string>(), kFix);
  }
  return finding(Health::kWarn, what,
                 fmt::format("{}, {:.0f} GB/s",
                             link.at("reached").get<bool>() ? "slower than others"
                                                            : "no way to each other's memory",
                             speed_of(link) / 1e9),
                 kFix);
}

// One line for the links that are as they should be, and one for each other.
std::vector<Finding> describe_links(const Json& links) {
  double fastest = 0;
  for (const Json& link : links) fastest = std::max(fastest, speed_of(link));
  std::vector<Finding> found;
  std::vector<const Json*> good;
  for (const Json& link : links) {
    const bool is_good = link.value("reached", false) && speed_of(link) >= fastest / 2;
    if (is_good) good.push_back(&link);
    if (!is_good) found.push_back(describe_bad_link(link));
  }
  if (good.empty()) return found;
  const auto range = [&](const char* key) {
    const auto [least, most] = std::ranges::minmax(
        good, {}, [&](const Json* link) { return link->at(key).get<double>(); });
    return std::pair{least->at(key).get<double>(), most->at(key).get<double>()};
  };
  const auto [slowest, quickest] = range("bytes_per_s");
  const auto [shortest, longest] = range("seconds");
  const auto [first_rank, last_rank] = range("rank");
  found.insert(
      found.begin(),
      finding(Health::kOk, "GPU links",
              fmt::format("{} with peer access, {:.0f} - {:.0f} GB/s, {:.1f} - {:.1f} us a "
                          "small copy, the driver's rank {:.0f} - {:.0f}",
                          good.size(), slowest / 1e9, quickest / 1e9, shortest * 1e6, longest * 1e6,
                          first_rank, last_rank),
              ""));
  return found;
}

Finding describe_pinned(const Json& pinned) {
  const double bytes = pinned.at("bytes");
  const std::string error = pinned.at("error");
  std::string found =
      fmt::format("{:.1f} GiB in {:.1f} s", bytes / kGib, pinned.at("seconds").get<double>());
  if (!error.empty()) found += ", then: " + error;
  return finding(error.empty() ? Health::kOk : Health::kFail, "pinnable memory", found,
                 "the KV store's memory (--kv-host-gib) is pinned: raise memlock (ulimit -l "
                 "unlimited) and the memory limit of the container or job");
}

// Bytes of a field of a node's meminfo: "Node 0 MemFree:   18301560 kB".
double node_bytes(const fs::path& node, const std::string& field) {
  std::ifstream in(node / "meminfo");
  std::string word;
  while (in >> word) {
    double kilobytes = 0;
    if (word == field + ":" && in >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

// Nothing of a machine with one node.
std::vector<Finding> describe_nodes(const fs::path& root) {
  std::string found;
  int count = 0;
  for (;; ++count) {
    const fs::path node = root / "sys/devices/system/node" / fmt::format("node{}", count);
    if (!fs::exists(node)) break;
    found += fmt::format("{}node {}: {:.1f} of {:.1f} GiB free", count > 0 ? ", " : "", count,
                         node_bytes(node, "MemFree") / kGib, node_bytes(node, "MemTotal") / kGib);
  }
  if (count < 2) return {};
  return {finding(Health::kOk, "NUMA", found, "")};
}

}  // namespace

std::vector<Finding> describe_gpus(const Json& probe, const fs::path& root) {
  if (probe.at("cuda").is_null()) {
    return {finding(Health::kWarn, "GPUs", "this is a build without CUDA",
                    "build where nvcc is found to serve on GPUs")};
  }
  std::vector<Finding> found = {describe_driver(probe, root),
                                describe_nccl(probe.at("nccl"), probe.at("devices").size())};
  for (const Json& device : probe.at("devices")) found.push_back(describe_gpu(device, root));
  std::ranges::move(describe_links(probe.at("links")), std::back_inserter(found));
  std::ranges::move(describe_nodes(root), std::back_inserter(found));
  if (!probe.at("pinned").is_null()) found.push_back(describe_pinned(probe["pinned"]));
  return found;
}

}  // namespace foretoken::launch
