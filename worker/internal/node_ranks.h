// NodeRanks: which ranks of MPI_COMM_WORLD are on this rank's node. All ranks make it together.
//
// wait_for_ranks: MPI's own waits have no deadline, and a rank that died before its part would make
// the others wait until mpirun ends them.
#pragma once

#include <mpi.h>

#include <string>
#include <vector>

namespace foretoken::worker {

// Until the collective has ended. Throws Exception(kDevice) after 60 s, which names `what`; its
// buffers are MPI's still: no other call into MPI may follow but MPI_Abort.
void wait_for_ranks(MPI_Request request, const std::string& what);

// The same of a collective that begin(MPI_Request*) starts.
template <typename Begin>
void do_with_ranks(const std::string& what, const Begin& begin) {
  MPI_Request request = MPI_REQUEST_NULL;
  begin(&request);
  wait_for_ranks(request, what);
}

class NodeRanks {
 public:
  NodeRanks();  // has no deadline: MPI splits communicators in no other way
  ~NodeRanks();
  NodeRanks(const NodeRanks&) = delete;
  NodeRanks& operator=(const NodeRanks&) = delete;

  int rank() const { return rank_; }  // on the node, in the order of the world's
  int count() const { return count_; }
  // What each of them says, by its rank on the node: every rank calls it, with words of one length.
  // Throws as wait_for_ranks.
  std::vector<std::string> gather(const std::string& word) const;

 private:
  MPI_Comm node_ = MPI_COMM_NULL;
  int rank_ = 0;
  int count_ = 1;
};

}  // namespace foretoken::worker
