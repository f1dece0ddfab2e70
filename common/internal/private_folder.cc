#include "common/private_folder.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "common/result.h"

namespace foretoken {

void require_private_folder(const std::filesystem::path& folder) {
  if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
    throw Exception(ErrorCode::kIo, "the folder " + folder.native() + ": " + std::strerror(errno));
  }
  struct stat info {};
  if (stat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    throw Exception(ErrorCode::kConfig, folder.native() + " is no folder");
  }
  if (info.st_uid != geteuid() || (info.st_mode & 077) != 0) {
    throw Exception(ErrorCode::kConfig,
                    "the folder " + folder.native() +
                        " is another user's or can be entered by others, and what lies in it is "
                        "to be ours alone; name one that is absent, or chmod 700 " +
                        folder.native());
  }
}

}  // namespace foretoken
