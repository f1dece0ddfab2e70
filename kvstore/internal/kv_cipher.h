// KvCipher: seals and opens KV that lies on a disk: encrypted, and bound to its place, so that what
// was changed, moved or is stale does not open (docs/decisions/007-encryption-at-rest.md).
//
//   const Seal seal = cipher.seal(slab, place);    // slab is ciphertext now
//   if (!cipher.open(slab, place, seal)) ...       // slab is nobody's now
//
// Each seal() draws 24 random bytes, its nonce, and no key and nonce are ever used for two texts:
//   AES-256-GCM          where the CPU has AES: with a key of its own for each nonce,
//                        BLAKE2b-256(nonce; key), and GCM's own nonce zero
//   XChaCha20-Poly1305   elsewhere: its nonces are so long that random ones may be used
// So nothing must be remembered from one seal, process or restart to the next, and any number of
// processes may have one key: n seals share a nonce with probability n^2 / 2^193.
//
// Owns the key: in memory of libsodium's, which is locked where the limits allow, between guard
// pages, in no core dump, and zeroed at the end. Thread-safe. Example: tests/kvstore/cipher_test.cc
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string_view>

#include "common/result.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

struct Seal {
  std::array<std::uint8_t, 24> nonce{};
  std::array<std::uint8_t, 16> tag{};
  bool operator==(const Seal&) const = default;
};

enum class CipherKind : std::uint32_t { kAes256Gcm = 1, kXChaCha20Poly1305 = 2 };
std::string_view cipher_name(CipherKind kind);

class KvCipher {
 public:
  // The one that this CPU is fast at.
  static CipherKind best_kind();

  // A key that nobody else has, and that ends with the process. Throws Exception(kIo).
  static std::shared_ptr<const KvCipher> random(CipherKind kind = best_kind());
  // A file of 64 hexadecimal digits, mode 0600. Throws Exception(kConfig).
  static std::shared_ptr<const KvCipher> from_file(const std::filesystem::path& path,
                                                   CipherKind kind = best_kind());
  // The key that hand_over() put into the pipe, once. Error: kUnavailable where it is not there,
  // kIo.
  static Result<std::shared_ptr<const KvCipher>> from_pipe(int pipe, CipherKind kind);

  // A pipe's end to read the key from, for another process of this user: the key then stands in no
  // message, and in no memory that is swapped. Error: kIo.
  Result<FileDescriptor> hand_over() const;

  CipherKind kind() const { return kind_; }

  // In place. `place`: what the bytes are bound to, as to open() them.
  Seal seal(std::span<std::byte> bytes, std::span<const std::byte> place) const;
  // In place. False: not what was sealed for this place; the bytes are then anything.
  [[nodiscard]] bool open(std::span<std::byte> bytes, std::span<const std::byte> place,
                          const Seal& seal) const;

 private:
  using Key = std::unique_ptr<unsigned char, void (*)(void*)>;
  KvCipher(Key key, CipherKind kind);

  Key key_;
  CipherKind kind_;
};

}  // namespace foretoken::kvstore
