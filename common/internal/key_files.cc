#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/check.h"
#include "common/socket.h"

namespace foretoken {
namespace {

constexpr std::size_t kKeyChars = 40;  // Z85 of 32 bytes

Error io_error(const std::filesystem::path& path, const std::string& what) {
  return {ErrorCode::kIo, "can't " + what + " " + path.string() + ": " + std::strerror(errno)};
}
Error key_error(const std::filesystem::path& path, const std::string& why) {
  return {ErrorCode::kConfig, "key file " + path.string() + ": " + why};
}

// Closes a file descriptor at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

KeyPair make_key_pair() {
  std::array<char, kKeyChars + 1> public_key{};
  std::array<char, kKeyChars + 1> secret_key{};
  FT_CHECK(zmq_curve_keypair(public_key.data(), secret_key.data()) == 0, "libzmq without CURVE");
  return {public_key.data(), secret_key.data()};
}

Status write_private_file(const std::filesystem::path& path, std::string_view contents) {
  const auto partial = path.string() + ".partial." + std::to_string(::getpid());
  ::unlink(partial.c_str());
  {
    const Descriptor file(
        ::open(partial.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (file.get() < 0) return io_error(partial, "create");
    if (::write(file.get(), contents.data(), contents.size()) !=
        static_cast<ssize_t>(contents.size())) {
      return io_error(partial, "write");
    }
  }
  if (::rename(partial.c_str(), path.c_str()) != 0) return io_error(path, "create");
  return Ok{};
}

Result<std::string> read_private_file(const std::filesystem::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  if (file.get() < 0) return io_error(path, "open");
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return io_error(path, "stat");
  if (info.st_uid != ::geteuid() && info.st_uid != 0) {
    return key_error(path, "belongs to another user");
  }
  if ((info.st_mode & 077) != 0) {
    return key_error(path, "others can read it; run: chmod 600 " + path.string());
  }
  std::array<char, 65536> buffer{};
  if (info.st_size > std::ssize(buffer)) {
    return key_error(path, "is larger than " + std::to_string(buffer.size()) + " bytes");
  }
  const auto count = ::read(file.get(), buffer.data(), buffer.size());
  if (count < 0) return io_error(path, "read");
  return std::string(buffer.data(), static_cast<std::size_t>(count));
}

bool is_curve_key(std::string_view text) {
  if (text.size() != kKeyChars) return false;
  std::array<std::uint8_t, 32> bytes{};
  return zmq_z85_decode(bytes.data(), std::string(text).c_str()) != nullptr;
}

Status write_client_keys(const std::filesystem::path& path, const ClientKeys& keys) {
  const nlohmann::json json = {{"server_public_key", keys.server_public_key},
                               {"public_key", keys.own.public_key},
                               {"secret_key", keys.own.secret_key}};
  return write_private_file(path, json.dump(2) + "\n");
}

Result<ClientKeys> read_client_keys(const std::filesystem::path& path) {
  FT_ASSIGN_OR_RETURN(const auto text, read_private_file(path));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return key_error(path, "is not a JSON object");
  ClientKeys keys;
  const auto take = [&](const char* name, std::string& into) -> Status {
    const auto found = json.find(name);
    if (found == json.end() || !found->is_string() || !is_curve_key(found->get<std::string>())) {
      return key_error(path, std::string(name) + " is not a CURVE key of 40 characters");
    }
    into = found->get<std::string>();
    return Ok{};
  };
  FT_RETURN_IF_ERROR(take("server_public_key", keys.server_public_key));
  FT_RETURN_IF_ERROR(take("public_key", keys.own.public_key));
  FT_RETURN_IF_ERROR(take("secret_key", keys.own.secret_key));
  return keys;
}

}  // namespace foretoken
