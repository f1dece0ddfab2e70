#include "kvstore/internal/weight_copy.h"

#include <fcntl.h>

#include "common/log.h"
#include "kvstore/internal/host_memory.h"

namespace foretoken::kvstore {

Status WeightCopy::check(const std::string& model_hash) const {
  if (!memory_ || model_hash == model_hash_) return Ok{};
  return Error{ErrorCode::kInvalidArgument,
               "the store holds the weights of model " + model_hash_ + ", not of " + model_hash};
}

Result<WeightCopy::Memory> WeightCopy::find(const std::string& model_hash) const {
  FT_RETURN_IF_ERROR(check(model_hash));
  if (!memory_ || filler_) {
    return Error{ErrorCode::kNotFound, "the store has no whole copy of the weights"};
  }
  return Memory{memory_.get(), bytes_};
}

Result<WeightCopy::Memory> WeightCopy::begin(FillerId filler, const std::string& model_hash,
                                             std::uint64_t bytes, std::uint64_t available_bytes) {
  FT_RETURN_IF_ERROR(check(model_hash));
  if (memory_) {
    return Error{ErrorCode::kUnavailable, filler_ ? "another rank is copying the weights"
                                                  : "the store has the weights already"};
  }
  if (bytes > available_bytes) {
    return Error{ErrorCode::kExhausted,
                 "the weights take " + std::to_string(bytes) + " bytes, and beside the KV arena " +
                     "the machine has " + std::to_string(available_bytes) + " to give"};
  }
  FT_ASSIGN_OR_RETURN(memory_, make_shared_memory("foretoken-weights", bytes));
  bytes_ = bytes;
  model_hash_ = model_hash;
  filler_ = filler;
  return Memory{memory_.get(), bytes_};
}

Result<WeightCopy::Memory> WeightCopy::complete(FillerId filler) {
  if (filler_ != filler) {
    return Error{ErrorCode::kInvalidArgument, "these weights are not this rank's to fill"};
  }
  if (const Status sealed = seal(memory_, F_SEAL_WRITE | F_SEAL_SEAL); !sealed) {
    forget(filler);
    return sealed.error();
  }
  filler_.reset();
  log().info("the weights of model {} are kept: {} bytes", model_hash_, bytes_);
  return Memory{memory_.get(), bytes_};
}

void WeightCopy::forget(FillerId filler) {
  if (filler_ != filler) return;
  filler_.reset();
  memory_.reset();
}

}  // namespace foretoken::kvstore
