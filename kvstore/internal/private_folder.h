// A folder that only our user can enter: sockets and KV files lie in such ones.
#pragma once

#include <filesystem>

namespace foretoken::kvstore {

// Makes it, mode 0700, if it is absent. Throws Exception(kConfig) where it is another user's or
// others can enter it, kIo where it can't be made.
void require_private_folder(const std::filesystem::path& folder);

}  // namespace foretoken::kvstore
