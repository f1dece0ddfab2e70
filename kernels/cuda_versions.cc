#include "kernels/cuda_machine.h"

namespace foretoken::kernels {

std::string cuda_version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string why_driver_is_too_old(const CudaVersions& versions) {
  if (versions.driver / 1000 >= versions.program / 1000) return "";
  return "the NVIDIA driver is too old: it takes CUDA up to " + cuda_version_name(versions.driver) +
         ", this program needs " + cuda_version_name(versions.program) + ": update it";
}

}  // namespace foretoken::kernels
