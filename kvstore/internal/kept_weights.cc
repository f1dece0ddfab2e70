#include "kvstore/kept_weights.h"

#include <numa.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "kvstore/internal/connection.h"
#include "kvstore/internal/host_memory.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kPieceBytes = std::size_t{16} << 20;
constexpr int kMaxThreads = 8;  // as many as read a model's files for a GPU
constexpr int kCopyNice = 10;   // serving goes first

struct Copy {
  std::byte* to;
  std::span<const std::byte> from;
};

// Whole pieces of `to`, which are whole huge pages, but where a piece of the source ends.
std::vector<Copy> plan_copies(std::byte* to, std::span<const std::span<const std::byte>> pieces) {
  std::vector<Copy> copies;
  std::byte* const begin = to;
  for (std::span<const std::byte> piece : pieces) {
    while (!piece.empty()) {
      const std::size_t left = kPieceBytes - static_cast<std::size_t>(to - begin) % kPieceBytes;
      const auto part = piece.first(std::min(left, piece.size()));
      copies.push_back({to, part});
      to += part.size();
      piece = piece.subspan(part.size());
    }
  }
  return copies;
}

Status copy_all(const std::vector<Copy>& copies, const std::stop_token& stop) {
  std::atomic<std::size_t> next{0};
  std::atomic<int> failed_errno{0};  // of a copy that found no memory; 0: none
  const auto run = [&] {
    setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kCopyNice);
    for (std::size_t i = 0; (i = next.fetch_add(1)) < copies.size();) {
      if (stop.stop_requested() || failed_errno != 0) return;
      const auto& [to, from] = copies[i];
      if (!populate(to, from.size())) {
        failed_errno = errno;
        return;
      }
      std::memcpy(to, from.data(), from.size());
    }
  };
  {
    std::vector<std::jthread> threads;
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    for (int i = std::clamp(cores / 2, 1, kMaxThreads); i > 0; --i) threads.emplace_back(run);
  }
  if (failed_errno != 0) {
    return Error{ErrorCode::kExhausted, std::string("no memory for a copy of the weights: ") +
                                            std::strerror(failed_errno)};
  }
  if (stop.stop_requested()) return Error{ErrorCode::kCancelled, "the copying was stopped"};
  return Ok{};
}

}  // namespace

struct KeptWeights::Impl {
  Connection connection;
  std::string model_hash;
  FileDescriptor found;  // what the path that find() returned leads to
};

KeptWeights::KeptWeights(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KeptWeights::~KeptWeights() = default;

Result<std::unique_ptr<KeptWeights>> KeptWeights::connect(const std::string& socket_path,
                                                          const std::string& model_hash,
                                                          std::chrono::milliseconds timeout) {
  try {
    FT_ASSIGN_OR_RETURN(FileDescriptor socket, connect_to(socket_path, timeout));
    return std::unique_ptr<KeptWeights>(new KeptWeights(
        std::make_unique<Impl>(Impl{Connection(std::move(socket)), model_hash, FileDescriptor()})));
  } catch (const Exception& failure) {  // no socket can be made
    return failure.error();
  }
}

// By the path, since a descriptor that may write maps no memory that is sealed against it (Linux
// before 6.7), whatever for.
Result<std::filesystem::path> KeptWeights::find() {
  FindWeights request;
  request.model_hash = impl_->model_hash;
  FT_RETURN_IF_ERROR(impl_->connection.ask_for<WeightMemory>(request, &impl_->found));
  if (!impl_->found) return out_of_step("did not hand over its copy of the weights");
  return std::filesystem::path("/proc/self/fd") / std::to_string(impl_->found.get());
}

Status KeptWeights::keep(std::span<const std::span<const std::byte>> pieces,
                         const std::stop_token& stop) {
  KeepWeights request;
  request.model_hash = impl_->model_hash;
  for (const auto& piece : pieces) request.bytes += piece.size();
  FileDescriptor passed;
  FT_ASSIGN_OR_RETURN(const WeightMemory memory,
                      impl_->connection.ask_for<WeightMemory>(request, &passed));
  if (!passed || memory.bytes != request.bytes) return out_of_step("gave other memory");
  {
    FT_ASSIGN_OR_RETURN(const SharedMapping mapped,
                        SharedMapping::map(passed.get(), 0, memory.bytes));
    // Ranks of all NUMA nodes read it.
    if (num_numa_nodes() > 1) {
      numa_interleave_memory(mapped.base(), mapped.bytes(), numa_all_nodes_ptr);
    }
    FT_RETURN_IF_ERROR(copy_all(plan_copies(mapped.base(), pieces), stop));
  }
  FT_RETURN_IF_ERROR(impl_->connection.ask_for<WeightMemory>(WeightsFilled{}));
  return Ok{};
}

}  // namespace foretoken::kvstore
