// What an operator does with a folder that no store has in use: `foretoken kv stat|verify|gc DIR`.
//
//   stat     whose KV the file holds, and how much
//   verify   the same, after each slab was read and checked
//   gc       the same, and gives the space of what failed, and of free slots, back to the file
//            system
//
// Throws Exception: kNotFound where the folder has no file, kCorrupt where it is none of ours, as
// NvmeFile where it can't be opened; kConfig without its key; kTimeout and kIo where the disk does
// not answer, for 10 s at the start and 1 s later on, or fails again and again: then nothing is
// given back. Examples: tests/kvstore/store_tools_test.cc, tests/launch/nvme_test.py
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "kvstore/internal/block_device.h"

namespace foretoken::kvstore {

using MakeDevice =
    std::function<std::unique_ptr<BlockDevice>(int file, const IoMemory& memory, int depth)>;

struct ToolTarget {
  std::filesystem::path folder;
  std::shared_ptr<const KvCipher> cipher = nullptr;  // of an encrypted file
  MakeDevice make_device = make_block_device;        // a test's own fails and stands still
};

nlohmann::ordered_json stat_file(const ToolTarget& target);
nlohmann::ordered_json verify_file(const ToolTarget& target);
nlohmann::ordered_json collect_file(const ToolTarget& target);

}  // namespace foretoken::kvstore
