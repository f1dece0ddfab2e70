#include "worker/internal/nccl_versions.h"

namespace foretoken::worker {
namespace {

constexpr const char* kWhatToDo =
    "; see LD_LIBRARY_PATH and LD_PRELOAD, and launch/bundle.sh --cuda; `foretoken doctor` shows "
    "more";

}  // namespace

std::string nccl_version_name(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::string why_nccl_is_too_old(int loaded, int built) {
  if (loaded / 100 >= built / 100) return "";
  return "NCCL " + nccl_version_name(loaded) +
         " is loaded, and is too old: this program was built with " + nccl_version_name(built);
}

Status check_nccl_versions(std::span<const int> loaded, int built) {
  for (std::size_t rank = 0; rank < loaded.size(); ++rank) {
    const std::string why = why_nccl_is_too_old(loaded[rank], built);
    if (!why.empty()) {
      return Error{ErrorCode::kDevice, "on rank " + std::to_string(rank) + " " + why + kWhatToDo};
    }
    if (loaded[rank] == loaded[0]) continue;
    return Error{ErrorCode::kDevice, "rank 0 has loaded NCCL " + nccl_version_name(loaded[0]) +
                                         " and rank " + std::to_string(rank) + " " +
                                         nccl_version_name(loaded[rank]) +
                                         ", which do not connect: give all nodes one" + kWhatToDo};
  }
  return Ok{};
}

}  // namespace foretoken::worker
