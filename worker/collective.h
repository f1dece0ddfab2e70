// Collective: how the ranks of a worker group combine tensors: NCCL on GPUs, MPI on the CPU
// backend.
//
// Called by the step thread alone, in the same order on every rank. Every rank gets bit-equal
// results. A broken group throws Exception(kDevice).
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/device.h"
#include "kernels/peer_sum.h"

namespace foretoken::worker {

class Collective {
 public:
  virtual ~Collective() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // data[i] = sum over ranks of data[i]; activations of the device's type.
  virtual void all_reduce(void* data, std::size_t count, kernels::Stream& stream) = 0;

  // all_reduce in two steps, where the ranks can: between them other work on the stream goes on
  // beside the sum, and nothing writes the data. end_sum() ends the oldest that was begun.
  // REQUIRES of both: begins_sums().
  static constexpr std::size_t kMaxBegun = 2;
  virtual bool begins_sums(std::size_t /*count*/) const { return false; }
  virtual void begin_sum(void* data, std::size_t count, kernels::Stream& stream);
  virtual void end_sum(kernels::Stream& stream);

  // What sums within a chain of products (Device::linear_chain); null where these ranks can't.
  virtual kernels::PeerSum* sum_in_chains() const { return nullptr; }

  // Joins columns: part [rows, widths[rank]] of each rank into all [rows, sum of widths]. fp32.
  // scratch: [world size, rows, widest of widths], the caller's, since a recorded step keeps its
  // address.
  virtual void all_gather_columns(const float* part, float* all, int rows,
                                  std::span<const int> widths, float* scratch,
                                  kernels::Stream& stream) = 0;
};

// Over MPI_COMM_WORLD; REQUIRES: MPI is initialised and outlives it. A world of one needs no MPI.
std::unique_ptr<Collective> make_mpi_collective();
std::unique_ptr<Collective> make_single_collective();
// Over NCCL, for ranks whose device is CUDA's; MPI tells them where to meet. The device outlives
// it. Sums of few bytes and one row of logits are kernels/peer_sum.h's where the ranks reach
// each other's memory, and on two ranks sums of up to sizes.most_bytes that are begun; unless all
// are to be NCCL's. REQUIRES of kByPeers: all ranks are on one node. Throws Exception(kDevice) when
// they can't connect, or in a program built without CUDA.
enum class Sums { kByPeers, kByNccl };
std::unique_ptr<Collective> make_nccl_collective(kernels::Device& device, Sums sums,
                                                 const kernels::PeerSumSizes& sizes);
// As NCCL numbers them: 22803 is 2.28.3. Both are 0 in a program built without CUDA.
struct NcclVersions {
  int loaded = 0;
  int built = 0;  // whose header this program was built with
};
NcclVersions nccl_versions();

}  // namespace foretoken::worker
