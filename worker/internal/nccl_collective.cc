// The collectives of GPU ranks, enqueued on the step's stream and so recorded with it: NCCL, and
// PeerSum for small sums, and for large ones of two ranks (docs/decisions/003-small-sums.md). MPI
// only tells the ranks where to meet.
#include <cuda_runtime_api.h>
#include <mpi.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/result.h"
#include "kernels/poll.h"
#include "worker/collective.h"
#include "worker/internal/nccl_versions.h"
#include "worker/internal/node_ranks.h"
#include "worker/internal/peer_connection.h"

namespace foretoken::worker {
namespace {

// To enqueue takes microseconds; to connect, as long as the slowest rank.
constexpr kernels::PollLimits kReadyLimits{.busy = std::chrono::milliseconds(1),
                                           .pause = std::chrono::microseconds(50),
                                           .deadline = std::chrono::seconds(60)};

void check_nccl(ncclResult_t status, const char* what) {
  if (status == ncclSuccess) return;
  throw Exception(ErrorCode::kDevice, std::string("NCCL ") + what +
                                          " failed: " + ncclGetErrorString(status) + " (" +
                                          ncclGetLastError(nullptr) + ")");
}

ncclDataType_t nccl_type(kernels::DataType type) {
  switch (type) {
    case kernels::DataType::kFp32:
      return ncclFloat32;
    case kernels::DataType::kFp16:
      return ncclFloat16;
    case kernels::DataType::kBf16:
      return ncclBfloat16;
  }
  FT_CHECK(false, static_cast<int>(type));
}

cudaStream_t handle_of(kernels::Stream& stream) {
  return static_cast<cudaStream_t>(stream.native_handle());
}

class NcclCollective final : public Collective {
 public:
  NcclCollective(kernels::Device& device, Sums sums, const kernels::PeerSumSizes& sizes)
      : device_(device) {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size_);
    check_versions();
    ncclUniqueId id{};
    if (rank_ == 0) check_nccl(ncclGetUniqueId(&id), "unique id");
    do_with_ranks("telling the ranks where NCCL meets", [&](MPI_Request* request) {
      MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, request);
    });
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // so that a rank that never comes is noticed
    check_started(ncclCommInitRankConfig(&comm_, world_size_, id, rank_, &config));
    wait_until_ready("connecting the ranks");
    if (sums == Sums::kByPeers) peers_.emplace(device_, rank_, world_size_, sizes);
    device_.set_wait_check([this] { check_peers(); });
  }
  ~NcclCollective() override {
    device_.set_wait_check([] {});
    peers_.reset();
    ncclCommAbort(comm_);
  }
  NcclCollective(const NcclCollective&) = delete;
  NcclCollective& operator=(const NcclCollective&) = delete;

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  void all_reduce(void* data, std::size_t count, kernels::Stream& stream) override {
    kernels::PeerSum* sum = peer_sum();
    if (sum != nullptr && sum->takes(count)) return sum->run(data, count, stream);
    check_started(ncclAllReduce(data, data, count, nccl_type(device_.activation_type()), ncclSum,
                                comm_, handle_of(stream)));
    wait_until_ready("all-reduce");
  }

  kernels::PeerSum* sum_in_chains() const override { return peer_sum(); }

  bool begins_sums(std::size_t count) const override {
    return peer_sum() != nullptr && peer_sum()->begins(count);
  }
  void begin_sum(void* data, std::size_t count, kernels::Stream& stream) override {
    peer_sum()->begin(data, count, stream);
  }
  void end_sum(kernels::Stream& stream) override { peer_sum()->end(stream); }

  // NCCL gathers equal parts: each rank's is padded to the widest, and the rows are put together
  // from there.
  void all_gather_columns(const float* part, float* all, int rows, std::span<const int> widths,
                          float* scratch, kernels::Stream& stream) override {
    FT_CHECK(static_cast<int>(widths.size()) == world_size_, widths.size(), world_size_);
    kernels::PeerSum* peers = peer_sum();
    if (rows == 1 && peers != nullptr && peers->gathers(widths)) {
      return peers->gather(part, all, widths, stream);
    }
    const auto widest = static_cast<std::size_t>(*std::ranges::max_element(widths));
    const std::size_t part_floats = widest * static_cast<std::size_t>(rows);
    float* own = scratch + part_floats * static_cast<std::size_t>(rank_);
    const auto own_width = static_cast<std::size_t>(widths[static_cast<std::size_t>(rank_)]);
    device_.copy(own, part, own_width * static_cast<std::size_t>(rows) * sizeof(float), stream);
    check_started(ncclAllGather(own, scratch, part_floats, ncclFloat32, comm_, handle_of(stream)));
    wait_until_ready("all-gather");
    const auto total = static_cast<std::size_t>(std::accumulate(widths.begin(), widths.end(), 0));
    std::size_t column = 0;
    for (std::size_t i = 0; i < widths.size(); ++i) {
      const std::size_t bytes = static_cast<std::size_t>(widths[i]) * sizeof(float);
      copy_rows(all + column, total * sizeof(float), scratch + part_floats * i, bytes, rows,
                stream);
      column += static_cast<std::size_t>(widths[i]);
    }
  }

 private:
  // Before NCCL finds out, which says less.
  void check_versions() const {
    const NcclVersions own = nccl_versions();
    std::vector<int> loaded(static_cast<std::size_t>(world_size_));
    do_with_ranks("comparing versions of NCCL", [&](MPI_Request* request) {
      MPI_Iallgather(&own.loaded, 1, MPI_INT, loaded.data(), 1, MPI_INT, MPI_COMM_WORLD, request);
    });
    const Status fit = check_nccl_versions(loaded, own.built);
    if (!fit) throw Exception(fit.error());
  }
  kernels::PeerSum* peer_sum() const { return peers_ ? peers_->sum() : nullptr; }
  static void check_started(ncclResult_t status) {
    if (status != ncclInProgress) check_nccl(status, "start");
  }
  // A wait for the device may be a wait for ranks that will never come.
  void check_peers() const {
    ncclResult_t state = ncclSuccess;
    check_nccl(ncclCommGetAsyncError(comm_, &state), "state");
    if (state != ncclInProgress) check_nccl(state, "all-reduce with the other ranks");
  }
  void wait_until_ready(const char* what) {
    ncclResult_t state = ncclInProgress;
    const auto is_ready = [&] {
      check_nccl(ncclCommGetAsyncError(comm_, &state), what);
      return state != ncclInProgress;
    };
    if (kernels::poll_until(is_ready, kReadyLimits, [] {})) return check_nccl(state, what);
    throw Exception(ErrorCode::kDevice,
                    std::string("NCCL ") + what +
                        " took longer than 60 s: a rank is missing, or can't be "
                        "reached; NCCL_DEBUG=INFO says more");
  }
  static void copy_rows(float* to, std::size_t to_stride, const float* from, std::size_t row_bytes,
                        int rows, kernels::Stream& stream) {
    const cudaError_t status =
        cudaMemcpy2DAsync(to, to_stride, from, row_bytes, row_bytes, static_cast<std::size_t>(rows),
                          cudaMemcpyDeviceToDevice, handle_of(stream));
    if (status != cudaSuccess) {
      throw Exception(ErrorCode::kDevice,
                      std::string("joining logits: ") + cudaGetErrorString(status));
    }
  }

  kernels::Device& device_;
  int rank_ = 0;
  int world_size_ = 1;
  ncclComm_t comm_ = nullptr;
  std::optional<PeerConnection> peers_;
};

}  // namespace

std::unique_ptr<Collective> make_nccl_collective(kernels::Device& device, Sums sums,
                                                 const kernels::PeerSumSizes& sizes) {
  return std::make_unique<NcclCollective>(device, sums, sizes);
}

NcclVersions nccl_versions() {
  NcclVersions versions{.built = NCCL_VERSION_CODE};
  check_nccl(ncclGetVersion(&versions.loaded), "version");
  return versions;
}

}  // namespace foretoken::worker
