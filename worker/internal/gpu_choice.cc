#include "worker/internal/gpu_choice.h"

namespace foretoken::worker {
namespace {

constexpr const char* kWhatToDo =
    "; each rank needs one of its own: lower --tensor-parallel-size, or see CUDA_VISIBLE_DEVICES";

}  // namespace

Result<int> choose_gpu(const GpuPlace& place) {
  if (place.num_devices >= place.ranks_on_node) {
    return (place.group * place.ranks_on_node + place.rank_on_node) % place.num_devices;
  }
  if (place.num_devices == 1) return 0;
  return Error{ErrorCode::kDevice, std::to_string(place.ranks_on_node) +
                                       " ranks are on this node, which has " +
                                       std::to_string(place.num_devices) + " GPUs" + kWhatToDo};
}

Status check_own_gpu(const std::vector<std::string>& ids, int rank_on_node) {
  const auto own = static_cast<std::size_t>(rank_on_node);
  for (std::size_t other = 0; other < ids.size(); ++other) {
    if (other == own || ids[other] != ids[own]) continue;
    return Error{ErrorCode::kDevice,
                 std::to_string(ids.size()) + " ranks are on this node, and ranks " +
                     std::to_string(rank_on_node) + " and " + std::to_string(other) +
                     " of them see the same single GPU" + kWhatToDo};
  }
  return Ok{};
}

}  // namespace foretoken::worker
