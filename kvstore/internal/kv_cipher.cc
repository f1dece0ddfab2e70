#include "kvstore/internal/kv_cipher.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sodium.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "common/check.h"
#include "common/result.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kKeyBytes = 32;
constexpr std::size_t kGcmNonceBytes = 12;

static_assert(kKeyBytes == crypto_aead_xchacha20poly1305_ietf_KEYBYTES);
static_assert(sizeof(Seal::nonce) == crypto_aead_xchacha20poly1305_ietf_NPUBBYTES);
static_assert(sizeof(Seal::tag) == crypto_aead_xchacha20poly1305_ietf_ABYTES);

// libsodium takes no null pointer, not even for no bytes.
const unsigned char* raw(std::span<const std::byte> bytes) {
  constexpr static unsigned char kNothing = 0;
  return bytes.empty() ? &kNothing : reinterpret_cast<const unsigned char*>(bytes.data());
}
unsigned char* raw(std::span<std::byte> bytes) {
  return const_cast<unsigned char*>(raw(std::span<const std::byte>(bytes)));
}

std::unique_ptr<unsigned char, void (*)(void*)> make_key() {
  if (sodium_init() < 0) throw Exception(ErrorCode::kIo, "libsodium can't be used here");
  auto* bytes = static_cast<unsigned char*>(sodium_malloc(kKeyBytes));
  if (bytes == nullptr) throw Exception(ErrorCode::kIo, "no guarded memory for the KV's key");
  return {bytes, sodium_free};
}

// AES-256-GCM with the nonce's own key. OpenSSL's: twice as fast as libsodium's
// (docs/measurements.md#encryption).
class Gcm {
 public:
  Gcm(const unsigned char* key, const Seal& seal) : context_(EVP_CIPHER_CTX_new()) {
    FT_CHECK(context_ != nullptr);
    crypto_generichash(key_.data(), key_.size(), seal.nonce.data(), seal.nonce.size(), key,
                       kKeyBytes);
  }
  ~Gcm() {
    sodium_memzero(key_.data(), key_.size());
    EVP_CIPHER_CTX_free(context_);  // which zeroes its own
  }
  Gcm(const Gcm&) = delete;
  Gcm& operator=(const Gcm&) = delete;

  void seal(std::span<std::byte> bytes, std::span<const std::byte> place, Seal& seal) {
    begin(1, bytes, place);
    int written = 0;
    FT_CHECK(EVP_CipherFinal_ex(context_, nullptr, &written) == 1);
    FT_CHECK(EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_GET_TAG, tag_bytes(seal),
                                 seal.tag.data()) == 1);
  }
  bool open(std::span<std::byte> bytes, std::span<const std::byte> place, Seal seal) {
    begin(0, bytes, place);
    FT_CHECK(EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_SET_TAG, tag_bytes(seal),
                                 seal.tag.data()) == 1);
    int written = 0;
    return EVP_CipherFinal_ex(context_, nullptr, &written) == 1;
  }

 private:
  static int tag_bytes(const Seal& seal) { return static_cast<int>(seal.tag.size()); }
  void begin(int encrypts, std::span<std::byte> bytes, std::span<const std::byte> place) {
    constexpr std::array<unsigned char, kGcmNonceBytes> kZero{};
    int written = 0;
    FT_CHECK(EVP_CipherInit_ex(context_, EVP_aes_256_gcm(), nullptr, key_.data(), kZero.data(),
                               encrypts) == 1);
    FT_CHECK(EVP_CipherUpdate(context_, nullptr, &written, raw(place),
                              static_cast<int>(place.size())) == 1);
    FT_CHECK(EVP_CipherUpdate(context_, raw(bytes), &written, raw(bytes),
                              static_cast<int>(bytes.size())) == 1);
  }

  std::array<unsigned char, kKeyBytes> key_{};
  EVP_CIPHER_CTX* context_;
};

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& why) {
  throw Exception(ErrorCode::kConfig, "the KV's key file " + path.native() + " " + why);
}

FileDescriptor open_private(const std::filesystem::path& path) {
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  struct stat info {};
  if (!file || fstat(file.get(), &info) != 0)
    refuse(path, "can't be opened (a link is not followed)");
  if (!S_ISREG(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & 077) != 0) {
    refuse(path, "is not a regular file of this user alone: chmod 600");
  }
  return file;
}

}  // namespace

std::string_view cipher_name(CipherKind kind) {
  return kind == CipherKind::kAes256Gcm ? "AES-256-GCM" : "XChaCha20-Poly1305";
}

KvCipher::KvCipher(Key key, CipherKind kind) : key_(std::move(key)), kind_(kind) {
  sodium_mprotect_readonly(key_.get());
}

CipherKind KvCipher::best_kind() {
  const bool has_aes = sodium_init() >= 0 && crypto_aead_aes256gcm_is_available() == 1;
  return has_aes ? CipherKind::kAes256Gcm : CipherKind::kXChaCha20Poly1305;
}

std::shared_ptr<const KvCipher> KvCipher::random(CipherKind kind) {
  Key key = make_key();
  randombytes_buf(key.get(), kKeyBytes);
  return std::shared_ptr<const KvCipher>(new KvCipher(std::move(key), kind));
}

std::shared_ptr<const KvCipher> KvCipher::from_file(const std::filesystem::path& path,
                                                    CipherKind kind) {
  const FileDescriptor file = open_private(path);
  std::array<char, 2 * kKeyBytes + 2> text{};
  const ssize_t count = read(file.get(), text.data(), text.size());
  Key key = make_key();
  std::size_t made = 0;
  const char* end = nullptr;
  const bool is_key =
      count >= static_cast<ssize_t>(2 * kKeyBytes) &&
      sodium_hex2bin(key.get(), kKeyBytes, text.data(), 2 * kKeyBytes, nullptr, &made, &end) == 0 &&
      made == kKeyBytes;
  const bool ends =
      count == 2 * kKeyBytes || (count == 2 * kKeyBytes + 1 && text[2 * kKeyBytes] == '\n');
  sodium_memzero(text.data(), text.size());
  if (!is_key || !ends) refuse(path, "is not 64 hexadecimal digits: openssl rand -hex 32");
  return std::shared_ptr<const KvCipher>(new KvCipher(std::move(key), kind));
}

Result<std::shared_ptr<const KvCipher>> KvCipher::from_pipe(int pipe, CipherKind kind) {
  try {
    Key key = make_key();
    if (read(pipe, key.get(), kKeyBytes) != static_cast<ssize_t>(kKeyBytes)) {
      return Error{ErrorCode::kUnavailable, "the KV's key was not handed over"};
    }
    return std::shared_ptr<const KvCipher>(new KvCipher(std::move(key), kind));
  } catch (const Exception& failure) {
    return failure.error();
  }
}

Result<FileDescriptor> KvCipher::hand_over() const {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK) != 0) {
    return Error{ErrorCode::kIo, "no pipe for the KV's key"};
  }
  FileDescriptor out(ends[0]);
  const FileDescriptor in(ends[1]);
  if (write(in.get(), key_.get(), kKeyBytes) != static_cast<ssize_t>(kKeyBytes)) {
    return Error{ErrorCode::kIo, "the KV's key can't be handed over"};
  }
  return out;
}

Seal KvCipher::seal(std::span<std::byte> bytes, std::span<const std::byte> place) const {
  Seal seal;
  randombytes_buf(seal.nonce.data(), seal.nonce.size());
  if (kind_ == CipherKind::kAes256Gcm) {
    Gcm(key_.get(), seal).seal(bytes, place, seal);
  } else {
    crypto_aead_xchacha20poly1305_ietf_encrypt_detached(
        raw(bytes), seal.tag.data(), nullptr, raw(bytes), bytes.size(), raw(place), place.size(),
        nullptr, seal.nonce.data(), key_.get());
  }
  return seal;
}

bool KvCipher::open(std::span<std::byte> bytes, std::span<const std::byte> place,
                    const Seal& seal) const {
  if (kind_ == CipherKind::kAes256Gcm) return Gcm(key_.get(), seal).open(bytes, place, seal);
  return crypto_aead_xchacha20poly1305_ietf_decrypt_detached(
             raw(bytes), nullptr, raw(bytes), bytes.size(), seal.tag.data(), raw(place),
             place.size(), seal.nonce.data(), key_.get()) == 0;
}

}  // namespace foretoken::kvstore
