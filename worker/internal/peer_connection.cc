#include "worker/internal/peer_connection.h"

#include <mpi.h>

#include <chrono>
#include <exception>
#include <string>
#include <vector>

#include "common/log.h"
#include "common/result.h"
#include "kernels/poll.h"
#include "worker/internal/node_ranks.h"

namespace foretoken::worker {
namespace {

constexpr auto kConnecting = "connecting the ranks for sums";

bool all_ranks(bool so) {
  int all = so ? 1 : 0;
  do_with_ranks(kConnecting, [&](MPI_Request* request) {
    MPI_Iallreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD, request);
  });
  return all == 1;
}

// Empty where it is connected; else why it isn't. A rank that can't still gives the others an
// address, which none of them can open.
std::string connect(kernels::PeerSum& sum, int world_size) {
  std::string why_not;
  const auto attempt = [&why_not](const auto& step) {
    try {
      step();
    } catch (const Exception& failure) {
      why_not = failure.error().message;
    }
  };
  kernels::PeerSum::Address own{};
  attempt([&] { own = sum.address(); });
  std::vector<kernels::PeerSum::Address> all(static_cast<std::size_t>(world_size));
  do_with_ranks(kConnecting, [&](MPI_Request* request) {
    MPI_Iallgather(own.data(), sizeof own, MPI_BYTE, all.data(), sizeof own, MPI_BYTE,
                   MPI_COMM_WORLD, request);
  });
  if (why_not.empty()) attempt([&] { sum.connect(all); });
  return why_not;
}

}  // namespace

PeerConnection::PeerConnection(kernels::Device& device, int rank, int world_size,
                               const kernels::PeerSumSizes& sizes) {
  std::string why_not;
  if (world_size > kernels::PeerSum::kMaxRanks) {
    why_not = "there are more than " + std::to_string(kernels::PeerSum::kMaxRanks) + " ranks";
  } else {
    sum_ = kernels::make_peer_sum(device, rank, world_size, sizes);
    why_not = connect(*sum_, world_size);
    if (all_ranks(why_not.empty())) return;
    sum_->disconnect();
    // Then nobody has this rank's inbox open any more.
    do_with_ranks(kConnecting, [](MPI_Request* request) { MPI_Ibarrier(MPI_COMM_WORLD, request); });
    sum_.reset();
  }
  if (!why_not.empty()) log().warn("all sums go over NCCL, which is slower: {}", why_not);
}

// An inbox may go once nobody has it open. A rank that failed does not wait for the others, nor
// they for long.
PeerConnection::~PeerConnection() {
  if (sum_ == nullptr) return;
  sum_->disconnect();
  if (std::uncaught_exceptions() > 0) return;
  MPI_Request all_here = MPI_REQUEST_NULL;
  MPI_Ibarrier(MPI_COMM_WORLD, &all_here);
  const auto came = [&] {
    int done = 0;
    MPI_Test(&all_here, &done, MPI_STATUS_IGNORE);
    return done == 1;
  };
  kernels::poll_until(came, kernels::kEndLimits, [] {});
}

}  // namespace foretoken::worker
