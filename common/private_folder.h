// A folder that only our user can enter: sockets, keys and KV lie in such ones.
// Example: tests/common/private_folder_test.cc
#pragma once

#include <filesystem>

namespace foretoken {

// Makes it, mode 0700, if it is absent; one that is there stays as it is. Throws Exception(kConfig)
// where it is another user's or others can enter it, kIo where it can't be made.
void require_private_folder(const std::filesystem::path& folder);

}  // namespace foretoken
