// What the headers here promise of CUDA in a program that was built without it.
#include "common/result.h"
#include "kernels/cuda_machine.h"
#include "kernels/device.h"
#include "kernels/peer_sum.h"
#include "kernels/prefill_plans.h"

namespace foretoken::kernels {

std::unique_ptr<Device> make_cuda_device(const CudaDeviceConfig&) {
  throw Exception(ErrorCode::kDevice, why_no_cuda_device());
}
int num_cuda_devices() { return 0; }
std::string why_no_cuda_device() {
  return "this program was built without CUDA; build where nvcc is found, or use --device cpu";
}
std::string cuda_device_id(int) { throw Exception(ErrorCode::kDevice, why_no_cuda_device()); }
CudaVersions cuda_versions() { return {}; }
std::string cuda_pci_address(int) { throw Exception(ErrorCode::kDevice, why_no_cuda_device()); }
PeerLink measure_peer_link(int, int) { throw Exception(ErrorCode::kDevice, why_no_cuda_device()); }
std::unique_ptr<PeerSum> make_peer_sum(Device&, int, int, const PeerSumSizes&) {
  throw Exception(ErrorCode::kDevice, why_no_cuda_device());
}
std::jthread prepare_prefill(Device&, const PrefillShape&) { return {}; }

}  // namespace foretoken::kernels
