// KeptWeights: a rank's door to the copy of the model's weights that the store may hold, so that a
// group which starts again loads from memory (docs/decisions/008-weights-in-the-store.md).
//
//   auto kept = KeptWeights::connect(socket_path, model_hash).value_or_throw();
//   if (auto file = kept->find()) { ... read *file ... }   // the bytes that somebody kept
//   else { ... load from elsewhere ...; kept->keep(pieces, stop); }
//
// What the bytes are is the caller's business. Thread rule: one thread at a time.
// Example: tests/kvstore/kept_weights_test.cc
#pragma once

#include <chrono>
#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <stop_token>
#include <string>

#include "common/result.h"

namespace foretoken::kvstore {

class KeptWeights {
 public:
  // timeout: of connecting and of each request. Error: kUnavailable, kTimeout.
  static Result<std::unique_ptr<KeptWeights>> connect(
      const std::string& socket_path, const std::string& model_hash,
      std::chrono::milliseconds timeout = std::chrono::seconds(30));
  ~KeptWeights();
  KeptWeights(const KeptWeights&) = delete;
  KeptWeights& operator=(const KeptWeights&) = delete;

  // The whole copy as a file that this process can open (read-only) for as long as this lives; what
  // is mapped by then may stay so. Nobody changes its bytes. Error: kNotFound where there is none
  // (yet), kInvalidArgument where the store is another model's.
  Result<std::filesystem::path> find();

  // Has the store keep these pieces, one behind the other. Copies with several threads of low
  // priority; until it returns Ok nobody is given the copy. Error: kUnavailable where there is a
  // copy, or another rank makes one; kExhausted where memory is short; kCancelled by `stop`; kIo.
  // After an error this is to be destroyed: what was copied is given up then.
  Status keep(std::span<const std::span<const std::byte>> pieces, const std::stop_token& stop);

 private:
  struct Impl;
  explicit KeptWeights(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken::kvstore
