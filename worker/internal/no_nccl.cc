// What worker/collective.h promises of NCCL in a program that was built without CUDA.
#include "common/result.h"
#include "worker/collective.h"

namespace foretoken::worker {

std::unique_ptr<Collective> make_nccl_collective(kernels::Device&, Sums,
                                                 const kernels::PeerSumSizes&) {
  throw Exception(ErrorCode::kDevice, "this program was built without CUDA, and so without NCCL");
}

NcclVersions nccl_versions() { return {}; }

}  // namespace foretoken::worker
