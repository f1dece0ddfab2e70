#include "launch/internal/gpu_findings.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace foretoken::launch {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// A machine with two GPUs, each on a NUMA node of its own.
class GpuFindings : public testing::Test {
 protected:
  GpuFindings() {
    write(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\n");
    for (const std::string node : {"0", "1"}) {
      const std::string slot = "sys/bus/pci/devices/0000:" + node + "b:00.0/";
      write(slot + "numa_node", node + "\n");
      write(slot + "local_cpulist", node + "0-" + node + "7\n");
      write("sys/devices/system/node/node" + node + "/meminfo",
            "Node " + node + " MemTotal: 4194304 kB\nNode " + node + " MemFree: 2097152 kB\n");
    }
  }
  ~GpuFindings() override { fs::remove_all(root_); }

  void write(const fs::path& name, const std::string& text) const {
    fs::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name) << text;
  }
  static Json gpu(int index) {
    return {{"index", index},
            {"name", "NVIDIA H200"},
            {"pci_address", "0000:" + std::to_string(index) + "b:00.0"},
            {"memory_bytes", 150e9},
            {"compute_units", 132},
            {"to_device_bytes_per_s", 53e9},
            {"from_device_bytes_per_s", 52e9}};
  }
  static Json link(int from, int to, bool reached, double bytes_per_s) {
    return {{"from", from},       {"to", to},        {"rank", 0},
            {"reached", reached}, {"seconds", 2e-6}, {"bytes_per_s", bytes_per_s}};
  }
  Finding find(const std::string& what) const {
    for (const Finding& finding : describe_gpus(probe, root_)) {
      if (finding.what == what) return finding;
    }
    ADD_FAILURE() << "nothing about " << what;
    return {};
  }

  Json probe = {
      {"cuda", {{"driver", "13.0"}, {"program", "13.0"}, {"too_old", ""}}},
      {"nccl", {{"loaded", "2.28.3"}, {"built", "2.28.9"}, {"too_old", ""}}},
      {"why_none", ""},
      {"devices", {gpu(0), gpu(1)}},
      {"links", Json::array({link(0, 1, true, 380e9)})},
      {"pinned",
       {{"bytes", 1U << 30}, {"wanted_bytes", 1U << 30}, {"seconds", 0.5}, {"error", ""}}}};

 private:
  static fs::path make_root() {
    std::string pattern = testing::TempDir() + "/root-XXXXXX";
    return mkdtemp(pattern.data());
  }
  const fs::path root_ = make_root();
};

TEST_F(GpuFindings, AllIsWell) {
  for (const Finding& finding : describe_gpus(probe, "/nowhere")) {
    EXPECT_EQ(finding.health, Health::kOk) << finding.what << finding.found;
  }
  EXPECT_EQ(find("GPU driver").found, "580.65.06, takes CUDA up to 13.0; this program needs 13.0");
  EXPECT_EQ(find("NCCL").found, "2.28.3; this program was built with 2.28.9");
  EXPECT_NE(find("GPU 1").found.find("NUMA node 1, CPUs 10-17"), std::string::npos);
  EXPECT_EQ(find("NUMA").found, "node 0: 2.0 of 4.0 GiB free, node 1: 2.0 of 4.0 GiB free");
  EXPECT_NE(find("GPU links").found.find("1 with peer access, 380 - 380 GB/s, 2.0 - 2.0 us"),
            std::string::npos);
  EXPECT_EQ(find("pinnable memory").found, "1.0 GiB in 0.5 s");
}

TEST_F(GpuFindings, ADriverThatIsTooOldFailsWithWhy) {
  probe["cuda"]["driver"] = "12.4";
  probe["cuda"]["too_old"] = probe["why_none"] = "the NVIDIA driver is too old";
  EXPECT_EQ(find("GPU driver").health, Health::kFail);
  EXPECT_NE(find("GPU driver").found.find("takes CUDA up to 12.4; this program needs 13.0"),
            std::string::npos);
}

TEST_F(GpuFindings, ADriverWithoutAGpuIsAWarning) {
  probe["why_none"] = "the driver shows no GPU";
  EXPECT_EQ(find("GPU driver").health, Health::kWarn);
}

TEST_F(GpuFindings, AnNcclThatIsTooOldFailsWhereSeveralGpusNeedIt) {
  probe["nccl"]["too_old"] = "NCCL 2.27.5 is loaded, and is too old";
  EXPECT_EQ(find("NCCL").health, Health::kFail);
  probe["devices"] = Json::array({gpu(0)});
  EXPECT_EQ(find("NCCL").health, Health::kWarn);
}

TEST_F(GpuFindings, AnNcclThatDoesNotAnswerCostsItsOwnLineAlone) {
  probe["nccl"] = {{"error", "ncclGetVersion: invalid usage"}};
  EXPECT_EQ(find("NCCL").health, Health::kFail);
  EXPECT_EQ(find("NCCL").found, "ncclGetVersion: invalid usage");
  EXPECT_EQ(find("GPU links").health, Health::kOk);
}

TEST_F(GpuFindings, EachBadLinkHasALine) {
  probe["links"] = {link(0, 1, true, 380e9), link(0, 2, false, 20e9), link(1, 2, true, 50e9)};
  EXPECT_EQ(find("GPU links").health, Health::kOk);
  EXPECT_EQ(find("GPUs 0 - 2").health, Health::kWarn);
  EXPECT_NE(find("GPUs 0 - 2").found.find("no way"), std::string::npos);
  EXPECT_NE(find("GPUs 1 - 2").found.find("slower"), std::string::npos);
}

TEST_F(GpuFindings, WhatCannotBePinnedOrOpenedFails) {
  probe["pinned"]["error"] = "cudaHostRegister: out of memory";
  EXPECT_EQ(find("pinnable memory").health, Health::kFail);
  probe["devices"][1] = {{"index", 1}, {"error", "busy"}};
  EXPECT_EQ(find("GPU 1").health, Health::kFail);
}

TEST_F(GpuFindings, ABuildWithoutCudaSaysSo) {
  probe["cuda"] = nullptr;
  EXPECT_EQ(describe_gpus(probe, "/nowhere").size(), 1U);
}

}  // namespace
}  // namespace foretoken::launch
