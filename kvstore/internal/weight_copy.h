// WeightCopy: the store's copy of the model's weights, from which a group that starts again loads.
//
// One rank fills it: it asks for memory, copies, and says when all is there. Only then, and only if
// the kernel takes the seal against writing (it refuses while anybody has the memory mapped to
// write), is it handed out: nobody sees a half-filled copy, and nobody can change a whole one. A
// filler that is gone leaves nothing.
//
// What the bytes are is the ranks' business; here they belong to a model hash. For the server's
// thread. Example: tests/kvstore/kept_weights_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "common/result.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

class WeightCopy {
 public:
  using FillerId = std::uint64_t;
  struct Memory {
    int fd;
    std::uint64_t bytes;
  };

  // The whole copy. Error: kNotFound where there is none, kInvalidArgument for another model.
  Result<Memory> find(const std::string& model_hash) const;

  // Memory for the filler, of which the machine has available_bytes. Error: kUnavailable where
  // there is a copy, or another one fills it; kExhausted; kIo; kInvalidArgument as above.
  Result<Memory> begin(FillerId filler, const std::string& model_hash, std::uint64_t bytes,
                       std::uint64_t available_bytes);

  // All bytes are there. Error: kInvalidArgument from one who doesn't fill; kIo where it can't be
  // sealed: it is given up.
  Result<Memory> complete(FillerId filler);

  // Gives up what this one was filling, if it was.
  void forget(FillerId filler);

 private:
  Status check(const std::string& model_hash) const;

  FileDescriptor memory_;
  std::uint64_t bytes_ = 0;
  std::string model_hash_;          // with memory_
  std::optional<FillerId> filler_;  // none: the copy is whole, or there is none
};

}  // namespace foretoken::kvstore
