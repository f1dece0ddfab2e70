// PeerConnection: a PeerSum whose ranks found each other over MPI. All ranks of MPI_COMM_WORLD make
// it, and end it, together.
#pragma once

#include <memory>

#include "kernels/peer_sum.h"

namespace foretoken::worker {

class PeerConnection {
 public:
  // Without a sum where one can't reach another's memory; the log of a rank that can't says why.
  // REQUIRES: all ranks are on one node.
  PeerConnection(kernels::Device& device, int rank, int world_size,
                 const kernels::PeerSumSizes& sizes);
  ~PeerConnection();
  PeerConnection(const PeerConnection&) = delete;
  PeerConnection& operator=(const PeerConnection&) = delete;

  kernels::PeerSum* sum() const { return sum_.get(); }

 private:
  std::unique_ptr<kernels::PeerSum> sum_;
};

}  // namespace foretoken::worker
