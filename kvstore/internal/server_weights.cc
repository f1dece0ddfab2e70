// Server, the copy of the weights: who may ask for it, and how much memory there is.
#include "common/available_memory.h"
#include "kvstore/internal/server.h"

namespace foretoken::kvstore {

std::optional<Result<WeightCopy::Memory>> Server::ask_weights(PeerId id, const Request& request) {
  using Answer = Result<WeightCopy::Memory>;
  if (const auto* find = std::get_if<FindWeights>(&request)) {
    const Status fits = check_weights(find->version, find->model_hash);
    return fits ? weights_.find(find->model_hash) : Answer(fits.error());
  }
  if (const auto* keep = std::get_if<KeepWeights>(&request)) {
    const Status fits = check_weights(keep->version, keep->model_hash);
    return fits ? weights_.begin(id, keep->model_hash, keep->bytes, memory_beside_arena())
                : Answer(fits.error());
  }
  if (std::holds_alternative<WeightsFilled>(request)) return weights_.complete(id);
  return std::nullopt;
}

// A store serves one model: the first one's KV decides which.
Status Server::check_weights(int version, const std::string& model_hash) const {
  FT_RETURN_IF_ERROR(check_version(version));
  if (!model_ || model_->model_hash.empty() || model_->model_hash == model_hash) return Ok{};
  return Error{ErrorCode::kInvalidArgument,
               "the store holds the KV of model " + model_->model_hash + ", not of " + model_hash};
}

// What of the arena isn't touched yet the kernel still counts as available.
std::uint64_t Server::memory_beside_arena() const {
  const std::uint64_t available = available_host_memory();
  std::uint64_t untouched = config_.arena_bytes;
  if (arena_) {
    const ArenaLayout& layout = arena_->layout();
    untouched = layout.slab_bytes * (layout.slabs_per_head - arena_->num_ready()) *
                static_cast<std::uint64_t>(layout.num_kv_heads);
  }
  return available > untouched ? available - untouched : 0;
}

}  // namespace foretoken::kvstore
