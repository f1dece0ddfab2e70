#include "kernels/cuda_machine.h"

#include <array>
#include <cstdio>
#include <optional>

#include "kernels/cuda/cuda_check.h"

namespace foretoken::kernels {
namespace {

// A GPU's memory, for as long as it is measured with.
class Memory {
 public:
  Memory(int index, std::size_t bytes) {
    FT_CUDA(cudaSetDevice(index));
    FT_CUDA(cudaMalloc(&data_, bytes));
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Has a GPU reach another one's memory for as long as it lives.
class PeerAccess {
 public:
  PeerAccess(int from, int to) : from_(from), to_(to) {
    FT_CUDA(cudaSetDevice(from));
    FT_CUDA(cudaDeviceEnablePeerAccess(to, 0));
  }
  ~PeerAccess() {
    cudaSetDevice(from_);
    cudaDeviceDisablePeerAccess(to_);
  }
  PeerAccess(const PeerAccess&) = delete;
  PeerAccess& operator=(const PeerAccess&) = delete;

 private:
  int from_;
  int to_;
};

class Timer {
 public:
  Timer() {
    for (cudaEvent_t& event : events_) FT_CUDA(cudaEventCreate(&event));
  }
  ~Timer() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  void begin() { FT_CUDA(cudaEventRecord(events_[0])); }
  double end() {  // seconds
    FT_CUDA(cudaEventRecord(events_[1]));
    FT_CUDA(cudaEventSynchronize(events_[1]));
    float milliseconds = 0;
    FT_CUDA(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]));
    return milliseconds / 1e3;
  }

 private:
  std::array<cudaEvent_t, 2> events_{};
};

struct Ends {
  int from;
  int to;
};

// Seconds of one of `count` copies; the second run counts.
double time_copies(const Ends& ends, std::size_t bytes, int count) {
  const Memory target(ends.to, bytes);
  const Memory source(ends.from, bytes);  // its GPU is the current one from here on
  Timer timer;
  double seconds = 0;
  for (int run = 0; run < 2; ++run) {
    timer.begin();
    for (int i = 0; i < count; ++i) {
      FT_CUDA(
          cudaMemcpyPeerAsync(target.data(), ends.to, source.data(), ends.from, bytes, nullptr));
    }
    seconds = timer.end();
  }
  return seconds / count;
}

}  // namespace

CudaVersions cuda_versions() {
  CudaVersions versions{.program = CUDART_VERSION};
  cudaDriverGetVersion(&versions.driver);
  cudaGetLastError();
  return versions;
}

std::string cuda_pci_address(int index) {
  cudaDeviceProp properties{};
  FT_CUDA(cudaGetDeviceProperties(&properties, index));
  std::array<char, 32> name{};
  std::snprintf(name.data(), name.size(), "%04x:%02x:%02x.0", properties.pciDomainID,
                properties.pciBusID, properties.pciDeviceID);
  return name.data();
}

PeerLink measure_peer_link(int from, int to) {
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  constexpr std::size_t kFewBytes = 16;
  PeerLink link;
  int reached = 0;
  FT_CUDA(cudaDeviceCanAccessPeer(&reached, from, to));
  link.is_reached = reached != 0;
  std::optional<PeerAccess> access;
  if (link.is_reached) {
    FT_CUDA(cudaDeviceGetP2PAttribute(&link.rank, cudaDevP2PAttrPerformanceRank, from, to));
    access.emplace(from, to);
  }
  link.bytes_per_s = kBytes / time_copies({from, to}, kBytes, 4);
  link.seconds = time_copies({from, to}, kFewBytes, 100);
  return link;
}

}  // namespace foretoken::kernels
