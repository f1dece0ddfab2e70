#include "kvstore/internal/nvme_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "common/log.h"
#include "common/private_folder.h"
#include "common/result.h"

namespace foretoken::kvstore {
namespace {

constexpr std::chrono::seconds kLockPatience{10};
constexpr std::chrono::milliseconds kLockPause{10};
constexpr int kFlags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW;

[[noreturn]] void refuse(ErrorCode code, const std::filesystem::path& path,
                         const std::string& why) {
  throw Exception(code, "the NVMe tier's file " + path.native() + " " + why);
}

FileDescriptor open_direct(const std::filesystem::path& path) {
  FileDescriptor file(open(path.c_str(), kFlags | O_DIRECT, 0600));
  if (file) return file;
  if (errno == EINVAL) {
    log().warn("{} is on a file system without O_DIRECT: its pages are cached twice",
               path.native());
    file = FileDescriptor(open(path.c_str(), kFlags, 0600));
  }
  if (!file && errno == ELOOP) refuse(ErrorCode::kConfig, path, "is a symbolic link");
  if (!file) refuse(ErrorCode::kIo, path, std::string("can't be opened: ") + std::strerror(errno));
  return file;
}

// A killed store's operations may still be under way, and ranks have the file too: both hold it,
// and so its lock, until they have ended.
bool lock(int file) {
  const auto deadline = std::chrono::steady_clock::now() + kLockPatience;
  while (flock(file, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK || std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(kLockPause);
  }
  return true;
}

// The descriptor's file has no name left.
bool was_removed(int file) {
  struct stat info {};
  return fstat(file, &info) == 0 && info.st_nlink == 0;
}

void require_private_file(int file, const std::filesystem::path& path) {
  struct stat info {};
  if (fstat(file, &info) != 0) refuse(ErrorCode::kIo, path, std::strerror(errno));
  if (!S_ISREG(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & 077) != 0 ||
      info.st_nlink != 1) {
    refuse(ErrorCode::kConfig, path,
           "is not a regular file of this user alone with mode 0600 and one name; remove it");
  }
}

}  // namespace

NvmeFile::NvmeFile(std::filesystem::path folder) : path_(folder / "kv-slabs") {
  require_private_folder(folder);
  do {  // again where its last owner removed it while we waited for the lock
    file_ = open_direct(path_);
    if (!lock(file_.get())) {
      refuse(ErrorCode::kConfig, path_,
             "is in use by another store, or by a rank of one that was killed; give each store its "
             "own folder");
    }
  } while (was_removed(file_.get()));
  require_private_file(file_.get(), path_);
}

std::uint64_t NvmeFile::allocated_bytes() const {
  struct stat info {};
  if (fstat(fd(), &info) != 0) return 0;
  constexpr std::uint64_t kStatBlock = 512;  // POSIX: what st_blocks counts
  return static_cast<std::uint64_t>(info.st_blocks) * kStatBlock;
}

std::uint64_t NvmeFile::room_bytes() const {
  struct statvfs space {};
  if (fstatvfs(fd(), &space) != 0) return 0;
  return std::uint64_t{space.f_bavail} * space.f_frsize + allocated_bytes();
}

void NvmeFile::remove() const {
  if (unlink(path_.c_str()) != 0) {
    log().warn("{} could not be removed: {}", path_.native(), std::strerror(errno));
  }
}

}  // namespace foretoken::kvstore
