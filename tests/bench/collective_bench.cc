// The time of an all-reduce in a recorded step, by size: NCCL's beside kernels/peer_sum.h.
//
//   mpirun -n GPUS collective_bench
//
// One JSON array, microseconds an all-reduce; ends with code 1 where the two sums differ.
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/result.h"
#include "kernels/device.h"
#include "worker/collective.h"

namespace foretoken::worker {
namespace {

constexpr int kCalls = 64;  // a graph
constexpr int kLaunches = 20;

class Bench {
 public:
  explicit Bench(int rank)
      : device_(kernels::make_cuda_device({.index = rank})),
        stream_(device_->make_stream(kernels::StreamKind::kCompute)),
        nccl_(make_nccl_collective(*device_, Sums::kByNccl, {})),
        peers_(make_nccl_collective(*device_, Sums::kByPeers, {})),
        data_(*device_, std::size_t{16} << 20, kernels::MemoryUse::kActivations) {}

  // The slowest rank's.
  double microseconds(Collective& collective, std::size_t count) {
    device_->fill_zero(data_.data(), data_.bytes(), *stream_);
    const auto calls = [&] {
      for (int i = 0; i < kCalls; ++i) collective.all_reduce(data_.data(), count, *stream_);
    };
    calls();
    stream_->synchronize();
    const auto graph = device_->record(*stream_, calls);
    graph->launch(*stream_);
    stream_->synchronize();
    double best = 1e9;
    for (int i = 0; i < kLaunches; ++i) {
      MPI_Barrier(MPI_COMM_WORLD);
      const auto begin = std::chrono::steady_clock::now();
      graph->launch(*stream_);
      stream_->synchronize();
      const std::chrono::duration<double, std::micro> took =
          std::chrono::steady_clock::now() - begin;
      best = std::min(best, took.count() / kCalls);
    }
    MPI_Allreduce(MPI_IN_PLACE, &best, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return best;
  }

  // Of bf16 values that sum without rounding.
  bool sums_equal(std::size_t count, int rank) {
    std::vector<std::uint16_t> in(count);
    for (std::size_t i = 0; i < count; ++i) {
      in[i] = static_cast<std::uint16_t>(0x3F80 + (i + static_cast<std::size_t>(rank)) % 64);
    }
    std::vector<std::vector<std::uint16_t>> sums;
    for (Collective* collective : {nccl_.get(), peers_.get()}) {
      device_->copy_in(data_.data(), in.data(), 2 * count, *stream_);
      collective->all_reduce(data_.data(), count, *stream_);
      sums.emplace_back(count);
      device_->copy_out(sums.back().data(), data_.data(), 2 * count, *stream_);
      stream_->synchronize();
    }
    return sums[0] == sums[1];
  }

  Collective& nccl() { return *nccl_; }
  Collective& peers() { return *peers_; }

 private:
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> stream_;
  std::unique_ptr<Collective> nccl_;
  std::unique_ptr<Collective> peers_;
  kernels::DeviceBuffer data_;
};

int run() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  Bench bench(rank);
  nlohmann::json results;
  bool equal = true;
  for (std::size_t bytes = 8192; bytes <= std::size_t{4} << 20; bytes *= 2) {
    equal = bench.sums_equal(bytes / 2, rank) && equal;
    results.push_back({{"bytes", bytes},
                       {"nccl_us", bench.microseconds(bench.nccl(), bytes / 2)},
                       {"peers_us", bench.microseconds(bench.peers(), bytes / 2)}});
  }
  if (!equal) std::cerr << "rank " << rank << ": the sums differ\n";
  if (rank == 0) std::cout << results.dump(1) << std::endl;
  return equal ? 0 : 1;
}

}  // namespace
}  // namespace foretoken::worker

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  try {
    const int status = foretoken::worker::run();
    MPI_Finalize();
    return status;
  } catch (const foretoken::Exception& failure) {
    std::cerr << failure.error().message << "\n";
    MPI_Abort(MPI_COMM_WORLD, 5);
  }
  return 5;
}
