#include "worker/internal/node_ranks.h"

#include <chrono>
#include <exception>

#include "common/result.h"
#include "kernels/poll.h"

namespace foretoken::worker {
namespace {

// At a start: as long as the slowest rank takes to come.
constexpr kernels::PollLimits kRanksLimits{.busy = std::chrono::milliseconds(1),
                                           .pause = std::chrono::milliseconds(1),
                                           .deadline = std::chrono::seconds(60)};

}  // namespace

void wait_for_ranks(MPI_Request request, const std::string& what) {
  const auto has_ended = [&] {
    int done = 0;
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    return done == 1;
  };
  if (kernels::poll_until(has_ended, kRanksLimits, [] {})) return;
  throw Exception(ErrorCode::kDevice,
                  what + " took longer than 60 s: a rank is missing, or can't be reached");
}

NodeRanks::NodeRanks() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node_);
  MPI_Comm_rank(node_, &rank_);
  MPI_Comm_size(node_, &count_);
}

// A rank that failed does not wait for the others.
NodeRanks::~NodeRanks() {
  if (std::uncaught_exceptions() == 0) MPI_Comm_free(&node_);
}

std::vector<std::string> NodeRanks::gather(const std::string& word) const {
  const int bytes = static_cast<int>(word.size());
  std::string all(word.size() * static_cast<std::size_t>(count_), ' ');
  do_with_ranks("hearing from the ranks of this node", [&](MPI_Request* request) {
    MPI_Iallgather(word.data(), bytes, MPI_BYTE, all.data(), bytes, MPI_BYTE, node_, request);
  });
  std::vector<std::string> words;
  for (std::size_t at = 0; at < all.size(); at += word.size()) {
    words.push_back(all.substr(at, word.size()));
  }
  return words;
}

}  // namespace foretoken::worker
