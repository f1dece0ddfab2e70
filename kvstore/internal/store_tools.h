// What an operator does with a folder that no store has in use: `foretoken kv stat|verify|gc DIR`.
//
//   stat     whose KV the file holds, and how much
//   verify   the same, after each slab was read and checked
//   gc       the same, and gives the space of what failed, and of free slots, back to the file
//            system
//
// Throws Exception: kNotFound where the folder has no file, kCorrupt where it is none of ours, as
// NvmeFile where it can't be opened. Example: tests/launch/nvme_test.py
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>

namespace foretoken::kvstore {

nlohmann::ordered_json stat_file(const std::filesystem::path& folder);
nlohmann::ordered_json verify_file(const std::filesystem::path& folder);
nlohmann::ordered_json collect_file(const std::filesystem::path& folder);

}  // namespace foretoken::kvstore
