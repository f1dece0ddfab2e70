// NvmeFile: the NVMe tier's file, FOLDER/kv-slabs: private, locked for one store, past the page
// cache where the file system can (O_DIRECT).
//
// Owns the descriptor and with it the lock, which ends with the process. A symbolic link, another
// user's file or a second name for it is refused, so that nobody else can put KV under our hands.
// Example: tests/kvstore/nvme_store_test.cc
#pragma once

#include <cstdint>
#include <filesystem>

#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

class NvmeFile {
 public:
  // Makes folder and file if they are absent; waits up to 10 s for the lock. Throws
  // Exception(kConfig): the folder or the file is not ours alone, or another store has it; kIo.
  explicit NvmeFile(std::filesystem::path folder);

  int fd() const { return file_.get(); }
  // On disk; holes take nothing.
  std::uint64_t allocated_bytes() const;
  // What the file may grow to by what its file system has free, itself included.
  std::uint64_t room_bytes() const;
  // Takes the file's name away; its space comes back when the descriptor is closed.
  void remove() const;

 private:
  std::filesystem::path path_;
  FileDescriptor file_;
};

}  // namespace foretoken::kvstore
