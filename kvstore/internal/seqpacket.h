// SEQPACKET sockets over Unix paths: whole messages, in order, with file descriptors and the
// peer's credentials. What the store and its clients speak through.
#pragma once

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "common/result.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

// Binds and listens: the socket file is 0600, its folder is made 0700 if absent. A socket file that
// nobody listens on is replaced, and so is one of a store that was killed and is about to end;
// path() is removed at the end.
// Throws Exception(kConfig) where others can enter the folder, the path is too long or what is
// there is no socket, kPortInUse where a store serves the path already, kIo.
class Listener {
 public:
  explicit Listener(std::filesystem::path path);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int fd() const { return socket_.get(); }
  // The next peer, non-blocking. Empty: nobody waits. Where no descriptor is left, those who wait
  // are turned away: else they would be waiting, and nobody could take them, for ever.
  FileDescriptor accept();
  // How many were, since the last call.
  int take_turned_away() { return std::exchange(num_turned_away_, 0); }

 private:
  bool turn_away();

  std::filesystem::path path_;
  FileDescriptor socket_;
  FileDescriptor spare_;  // for turn_away()
  int num_turned_away_ = 0;
};

// Blocking, both ways bounded by `timeout` a message. Error: kUnavailable when nobody listens.
Result<FileDescriptor> connect_to(const std::filesystem::path& path,
                                  std::chrono::milliseconds timeout);

struct PeerCredentials {
  int pid = 0;
  unsigned uid = 0;
};
std::optional<PeerCredentials> credentials_of(int socket);

// Sends one message, with a file descriptor where passed_fd >= 0.
// Error: kUnavailable when the peer is gone, kTimeout when it does not read.
Status send_message(int socket, std::string_view message, std::optional<int> passed_fd = {});

struct Received {
  std::string message;    // empty: the peer has closed
  FileDescriptor passed;  // the first one, if there are more
};
// Error: kTimeout (nothing came; on a non-blocking socket: nothing is there), kUnavailable,
// kCorrupt for a message over max_bytes.
Result<Received> receive_message(int socket, std::size_t max_bytes);

}  // namespace foretoken::kvstore
