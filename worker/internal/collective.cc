#include "worker/collective.h"

#include <mpi.h>

#include <string>
#include <vector>

#include "common/check.h"
#include "common/result.h"

namespace foretoken::worker {
namespace {

void check_mpi(int status, const char* what) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(status, text, &length);
  throw Exception(ErrorCode::kDevice, std::string("MPI ") + what + " failed: " + text);
}

class MpiCollective final : public Collective {
 public:
  MpiCollective() {
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "rank");
    check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &world_size_), "size");
  }
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  void all_reduce(void* data, std::size_t count, kernels::Stream& stream) override {
    stream.synchronize();
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, data, static_cast<int>(count), MPI_FLOAT, MPI_SUM,
                            MPI_COMM_WORLD),
              "all-reduce");
  }

  void all_gather_columns(const float* part, float* all, int rows, std::span<const int> widths,
                          float*, kernels::Stream& stream) override {
    FT_CHECK(static_cast<int>(widths.size()) == world_size_, widths.size(), world_size_);
    stream.synchronize();
    std::vector<int> starts(widths.size(), 0);
    for (std::size_t i = 1; i < widths.size(); ++i) starts[i] = starts[i - 1] + widths[i - 1];
    const int total = starts.back() + widths.back();
    const int width = widths[static_cast<std::size_t>(rank_)];
    for (int row = 0; row < rows; ++row) {
      check_mpi(MPI_Allgatherv(part + static_cast<std::ptrdiff_t>(row) * width, width, MPI_FLOAT,
                               all + static_cast<std::ptrdiff_t>(row) * total, widths.data(),
                               starts.data(), MPI_FLOAT, MPI_COMM_WORLD),
                "all-gather");
    }
  }

 private:
  int rank_ = 0;
  int world_size_ = 1;
};

class SingleCollective final : public Collective {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  void all_reduce(void*, std::size_t, kernels::Stream&) override {}
  void all_gather_columns(const float*, float*, int, std::span<const int>, float*,
                          kernels::Stream&) override {
    FT_CHECK(false);  // a world of one has its logits already
  }
};

}  // namespace

void Collective::begin_sum(void*, std::size_t, kernels::Stream&) { FT_CHECK(false); }
void Collective::end_sum(kernels::Stream&) { FT_CHECK(false); }

std::unique_ptr<Collective> make_mpi_collective() { return std::make_unique<MpiCollective>(); }
std::unique_ptr<Collective> make_single_collective() {
  return std::make_unique<SingleCollective>();
}

}  // namespace foretoken::worker
