// What an operator's tools do on a disk that fails or stands still.
#include "kvstore/internal/store_tools.h"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <string>

#include "kvstore/internal/nvme_tier.h"
#include "tests/kvstore/memory_device.h"
#include "tests/kvstore/running_server.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {
namespace {

constexpr std::uint32_t kSlots = 4;
const NvmeGeometry kGeometry{kTestModel.slab_bytes(), kSlots};

class StoreToolsTest : public testing::Test {
 protected:
  StoreToolsTest() {
    const NvmeFile file(target.folder);
    const auto tier =
        NvmeTier::open(file, {kTestModel, kGeometry.file_bytes(), 0, NvmeReuse::kKeepSlabs})
            .value_or_throw();
    const auto now = [] { return std::chrono::steady_clock::now(); };
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const SlabName name = test_name(0, i);
      tier->store(name, test_slab(name).data(), now());
      while (!tier->is_idle()) static_cast<void>(tier->advance(now()));
    }
  }
  // The file as it is, on a disk with these faults.
  void fail(const std::function<IoFault(const IoOperation&)>& fault) {
    std::ifstream file(target.folder / "kv-slabs", std::ios::binary);
    bytes.resize(kGeometry.file_bytes());
    file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    target.make_device = [this, fault](int, const IoMemory&, int) {
      auto device = std::make_unique<MemoryDevice>(bytes);
      device->fault = fault;
      return device;
    };
  }
  void fail_slabs(IoFault what) {
    fail([what](const IoOperation& operation) {
      return operation.offset < kGeometry.slab_offset(SlotIndex{0}) ? IoFault::kNone : what;
    });
  }
  static std::string why(const std::function<void()>& tool) {
    try {
      tool();
    } catch (const Exception& failure) {
      return failure.what();
    }
    return "it worked";
  }

  TestFolder folder;
  ToolTarget target{folder.path() / "kv"};
  FileBytes bytes;
};

TEST_F(StoreToolsTest, ADiskThatDoesNotAnswerIsAnErrorInTime) {
  for (const IoFault what : {IoFault::kHeld, IoFault::kError}) {
    fail_slabs(what);
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_NE(why([&] { verify_file(target); }).find("does not answer"), std::string::npos);
    EXPECT_NE(why([&] { collect_file(target); }).find("nothing was changed"), std::string::npos);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  }
  target.make_device = make_block_device;
  const auto report = collect_file(target);
  EXPECT_EQ(report["slabs_held"], kSlots) << "all is there still";
  EXPECT_EQ(report["bad_slabs"], 0);
}

TEST_F(StoreToolsTest, WhatIsDamagedIsGivenBack) {
  fail_slabs(IoFault::kTorn);  // a read that leaves half of what the buffer held
  EXPECT_EQ(verify_file(target)["bad_slabs"], kSlots);
  target.make_device = make_block_device;
  EXPECT_EQ(verify_file(target)["bad_slabs"], 0);
}

TEST_F(StoreToolsTest, ASlotWhoseHeaderCantBeReadIsGivenBack) {
  fail([](const IoOperation& operation) {
    const std::uint64_t header = kGeometry.header_offset(SlotIndex{1});
    const bool covers = operation.offset <= header && header < operation.offset + operation.bytes;
    return covers ? IoFault::kError : IoFault::kNone;
  });
  const auto report = collect_file(target);
  EXPECT_EQ(report["unreadable_headers"], 1);
  EXPECT_EQ(report["slabs_held"], kSlots - 1);
  EXPECT_EQ(report["bad_slabs"], 0);
  target.make_device = make_block_device;
  const auto after = verify_file(target);
  EXPECT_EQ(after["unreadable_headers"], 0) << "a hole, which every file system can read";
  EXPECT_EQ(after["slabs_held"], kSlots - 1);
}

TEST_F(StoreToolsTest, ASuperblockThatLiesIsRefused) {
  std::filesystem::resize_file(target.folder / "kv-slabs", kGeometry.file_bytes() + 4096);
  EXPECT_NE(why([&] { stat_file(target); }).find("4 slots"), std::string::npos);
}

}  // namespace
}  // namespace foretoken::kvstore
