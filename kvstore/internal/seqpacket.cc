#include "kvstore/internal/seqpacket.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <thread>
#include <utility>

#include "common/private_folder.h"

namespace foretoken::kvstore {
namespace {

constexpr int kBacklog = 128;
// For a store that was killed: it listens until the last of its threads is gone, which a disk or
// the memory that is given back may keep for seconds.
constexpr std::chrono::seconds kEndingPatience{10};
constexpr std::chrono::milliseconds kEndingPause{100};

Error system_error(ErrorCode code, const std::string& what) {
  return {code, what + ": " + std::strerror(errno)};
}

Result<sockaddr_un> address_of(const std::filesystem::path& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string& name = path.native();
  if (name.empty() || name.size() >= sizeof address.sun_path) {
    return Error{ErrorCode::kConfig, "the socket path '" + name + "' is empty or longer than " +
                                         std::to_string(sizeof address.sun_path - 1) + " bytes"};
  }
  std::memcpy(address.sun_path, name.data(), name.size());
  return address;
}

FileDescriptor make_socket(int flags) {
  FileDescriptor made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0));
  if (!made) throw Exception(system_error(ErrorCode::kIo, "a Unix socket"));
  return made;
}

FileDescriptor accept_on(int socket) {
  return FileDescriptor(accept4(socket, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

FileDescriptor open_spare() { return FileDescriptor(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

// There is room for one in the buffer, and padding, in which the kernel puts a second one.
FileDescriptor take_first(const cmsghdr& rights) {
  FileDescriptor first;
  const std::size_t count = (rights.cmsg_len - CMSG_LEN(0)) / sizeof(int);
  for (std::size_t i = 0; i < count; ++i) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(&rights) + i * sizeof fd, sizeof fd);
    FileDescriptor one(fd);
    if (!first) first = std::move(one);
  }
  return first;
}

// Whether the process whose socket this is connected to has no main thread any more.
bool is_ending(const std::optional<PeerCredentials>& listener) {
  if (!listener || listener->pid <= 0) return false;  // of another namespace
  std::ifstream file("/proc/" + std::to_string(listener->pid) + "/stat");
  std::string line;  // "pid (name) state ...", where the name may hold anything
  std::getline(file, line);
  const std::size_t name_end = line.rfind(") ");
  if (name_end == std::string::npos) return true;  // gone just now
  const char state = line[name_end + 2];
  return state == 'Z' || state == 'X';
}

bool connects(int socket, const sockaddr_un& address) {
  return ::connect(socket, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
}

void set_timeout(int socket, std::chrono::milliseconds timeout) {
  timeval value{};
  value.tv_sec = timeout.count() / 1000;
  value.tv_usec = timeout.count() % 1000 * 1000;
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &value, sizeof value);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &value, sizeof value);
}

}  // namespace

Listener::Listener(std::filesystem::path path) : path_(std::move(path)) {
  const sockaddr_un address = address_of(path_).value_or_throw();
  require_private_folder(path_.has_parent_path() ? path_.parent_path() : ".");
  const auto deadline = std::chrono::steady_clock::now() + kEndingPatience;
  while (std::filesystem::exists(path_)) {
    const FileDescriptor peer = make_socket(0);
    if (!connects(peer.get(), address)) {
      const auto there = std::filesystem::symlink_status(path_);
      if (std::filesystem::exists(there) && !std::filesystem::is_socket(there)) {
        throw Exception(ErrorCode::kConfig,
                        path_.native() + " is there, and is no socket; give another path");
      }
      unlink(path_.c_str());
      break;
    }
    const auto listener = credentials_of(peer.get());
    if (!is_ending(listener)) {
      throw Exception(ErrorCode::kPortInUse, "a store serves " + path_.native() + " already");
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      throw Exception(ErrorCode::kPortInUse,
                      "the store that served " + path_.native() + " (pid " +
                          std::to_string(listener->pid) +
                          ") was killed and has not ended yet; start again when it has");
    }
    std::this_thread::sleep_for(kEndingPause);
  }
  socket_ = make_socket(SOCK_NONBLOCK);
  if (bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      chmod(path_.c_str(), 0600) != 0 || listen(socket_.get(), kBacklog) != 0) {
    throw Exception(system_error(ErrorCode::kIo, "listening on " + path_.native()));
  }
  spare_ = open_spare();
}

Listener::~Listener() {
  if (socket_) unlink(path_.c_str());
}

FileDescriptor Listener::accept() {
  for (;;) {
    FileDescriptor peer = accept_on(socket_.get());
    if (peer || (errno != EMFILE && errno != ENFILE) || !turn_away()) return peer;
  }
}

// False: nobody is there any more.
bool Listener::turn_away() {
  spare_.reset();
  const bool was_there{accept_on(socket_.get())};
  spare_ = open_spare();
  if (was_there) ++num_turned_away_;
  return was_there;
}

Result<FileDescriptor> connect_to(const std::filesystem::path& path,
                                  std::chrono::milliseconds timeout) {
  FT_ASSIGN_OR_RETURN(const sockaddr_un address, address_of(path));
  FileDescriptor made = make_socket(0);
  set_timeout(made.get(), timeout);
  if (!connects(made.get(), address)) {
    return system_error(ErrorCode::kUnavailable, "no KV store answers at " + path.native());
  }
  return made;
}

std::optional<PeerCredentials> credentials_of(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return std::nullopt;
  return PeerCredentials{peer.pid, peer.uid};
}

Status send_message(int socket, std::string_view message, std::optional<int> passed_fd) {
  iovec part{const_cast<char*>(message.data()), message.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (passed_fd) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &*passed_fd, sizeof(int));
  }
  ssize_t sent = 0;
  do {
    sent = sendmsg(socket, &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) return Ok{};
  const bool late = errno == EAGAIN || errno == EWOULDBLOCK;
  return system_error(late ? ErrorCode::kTimeout : ErrorCode::kUnavailable,
                      "sending to the peer of the KV store's socket");
}

Result<Received> receive_message(int socket, std::size_t max_bytes) {
  Received received;
  received.message.resize(max_bytes);
  iovec part{received.message.data(), max_bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  ssize_t size = 0;
  do {
    size = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  } while (size < 0 && errno == EINTR);
  if (size < 0) {
    const bool late = errno == EAGAIN || errno == EWOULDBLOCK;
    return system_error(late ? ErrorCode::kTimeout : ErrorCode::kUnavailable,
                        "receiving from the KV store's socket");
  }
  for (cmsghdr* rights = CMSG_FIRSTHDR(&header); rights != nullptr;
       rights = CMSG_NXTHDR(&header, rights)) {
    if (rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS) continue;
    received.passed = take_first(*rights);
  }
  if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    return Error{ErrorCode::kCorrupt, "a message is larger than " + std::to_string(max_bytes)};
  }
  received.message.resize(static_cast<std::size_t>(size));
  return received;
}

}  // namespace foretoken::kvstore
