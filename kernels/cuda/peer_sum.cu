#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"
#include "kernels/peer_sum.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxCtas = 32;
constexpr std::size_t kWordBytes = 8;  // of values; 16 on the way
constexpr int kWordsPerCta = PeerSum::kMaxBytes / kWordBytes / kMaxCtas;
constexpr int kWordsPerThread = kWordsPerCta / kThreads;

struct Params {
  uint2* data;
  int num_words;
  int rank;
  int world_size;
  uint4* inboxes[PeerSum::kMaxRanks];  // by rank
  std::uint32_t* calls;                // [CTAs] made so far
  const volatile int* stop;            // in host memory
};

// Where a rank's word of a call lies in an inbox.
__device__ std::size_t inbox_at(std::uint32_t call, int cta, int rank, int word) {
  const std::size_t half = call % 2;
  return ((half * kMaxCtas + cta) * PeerSum::kMaxRanks + rank) * kWordsPerCta + word;
}

__device__ void send(uint4* to, uint2 values, std::uint32_t call) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(to), "r"(values.x),
               "r"(call), "r"(values.y)
               : "memory");
}

// The values of a word once they have come; anything where it is told to stop.
__device__ uint2 receive(const uint4* from, std::uint32_t call, const volatile int* stop) {
  constexpr int kTriesPerLook = 4096;
  for (;;) {
    for (int i = 0; i < kTriesPerLook; ++i) {
      uint4 word;
      asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                   : "l"(from)
                   : "memory");
      if (word.y == call && word.w == call) return {word.x, word.z};
    }
    if (*stop != 0) return {0, 0};
  }
}

template <typename T>
__device__ void add(uint2 values, float4& sum) {
  const float2 low = unpack<T>(values.x);
  const float2 high = unpack<T>(values.y);
  sum = {sum.x + low.x, sum.y + low.y, sum.z + high.x, sum.w + high.y};
}

// A CTA has a run of neighbouring words, and counts its calls by itself.
template <typename T>
__global__ void __launch_bounds__(kThreads) peer_sum_kernel(const Params p) {
  allow_next_kernel();
  const int cta = blockIdx.x;
  const int per_cta = (p.num_words + gridDim.x - 1) / gridDim.x;
  const int begin = cta * per_cta;
  const int count = min(per_cta, p.num_words - begin);
  wait_for_earlier_kernels();

  const std::uint32_t call = p.calls[cta] + 1;
  uint2 own[kWordsPerThread];
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int word = threadIdx.x + i * kThreads;
    if (word >= count) break;
    own[i] = p.data[begin + word];
    for (int step = 1; step < p.world_size; ++step) {
      const int to = (p.rank + step) % p.world_size;
      send(p.inboxes[to] + inbox_at(call, cta, p.rank, word), own[i], call);
    }
  }
  const uint4* inbox = p.inboxes[p.rank];
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int word = threadIdx.x + i * kThreads;
    if (word >= count) break;
    float4 sum{};
    for (int from = 0; from < p.world_size; ++from) {
      const uint2 values =
          from == p.rank ? own[i] : receive(inbox + inbox_at(call, cta, from, word), call, p.stop);
      add<T>(values, sum);
    }
    p.data[begin + word] = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
  }
  __syncthreads();
  if (threadIdx.x == 0) p.calls[cta] = call;
}

// What an Address holds.
struct Inbox {
  cudaIpcMemHandle_t handle;  // for other processes
  pid_t process;
  uint4* memory;  // in that one
};
static_assert(sizeof(Inbox) <= sizeof(PeerSum::Address));

class CudaPeerSum final : public PeerSum {
 public:
  CudaPeerSum(Device& device, int rank, int world_size) : type_(device.activation_type()) {
    FT_CHECK(world_size <= kMaxRanks, world_size);
    params_.rank = rank;
    params_.world_size = world_size;
    constexpr std::size_t kInboxBytes =
        sizeof(uint4) * 2 * kMaxCtas * kMaxRanks * std::size_t{kWordsPerCta};
    // Not of the device's pool: other processes can't open that.
    FT_CUDA(cudaMalloc(&memory_, kInboxBytes + kMaxCtas * sizeof(std::uint32_t)));
    FT_CUDA(cudaMemset(memory_, 0, kInboxBytes + kMaxCtas * sizeof(std::uint32_t)));
    params_.inboxes[rank] = reinterpret_cast<uint4*>(memory_);
    params_.calls = reinterpret_cast<std::uint32_t*>(memory_ + kInboxBytes);
    FT_CUDA(cudaHostAlloc(&stop_, sizeof *stop_, cudaHostAllocMapped));
    *stop_ = 0;
    int* on_device = nullptr;
    FT_CUDA(cudaHostGetDevicePointer(&on_device, stop_, 0));
    params_.stop = on_device;
    FT_CUDA(cudaDeviceSynchronize());  // the zeros are there before anyone is told the address
  }
  ~CudaPeerSum() override {
    *stop_ = 1;
    disconnect();
    cudaFree(memory_);  // after what still runs on the device
    cudaFreeHost(stop_);
  }
  CudaPeerSum(const CudaPeerSum&) = delete;
  CudaPeerSum& operator=(const CudaPeerSum&) = delete;

  Address address() const override {
    Inbox inbox{.handle = {}, .process = getpid(), .memory = params_.inboxes[params_.rank]};
    FT_CUDA(cudaIpcGetMemHandle(&inbox.handle, memory_));
    Address address{};
    std::memcpy(address.data(), &inbox, sizeof inbox);
    return address;
  }

  void connect(std::span<const Address> addresses) override {
    FT_CHECK(static_cast<int>(addresses.size()) == params_.world_size, addresses.size());
    for (int rank = 0; rank < params_.world_size; ++rank) {
      if (rank == params_.rank) continue;
      Inbox inbox{};
      std::memcpy(&inbox, addresses[static_cast<std::size_t>(rank)].data(), sizeof inbox);
      void* memory = inbox.memory;
      if (inbox.process != getpid()) {
        FT_CUDA(cudaIpcOpenMemHandle(&memory, inbox.handle, cudaIpcMemLazyEnablePeerAccess));
        opened_.push_back(memory);
      }
      params_.inboxes[rank] = static_cast<uint4*>(memory);
    }
  }
  void disconnect() override {
    for (void* memory : opened_) cudaIpcCloseMemHandle(memory);
    opened_.clear();
  }

  bool takes(std::size_t count) const override {
    const std::size_t bytes = count * bytes_of(type_);
    return bytes <= kMaxBytes && bytes % kWordBytes == 0;
  }

  void run(void* data, std::size_t count, Stream& stream) override {
    FT_CHECK(takes(count), count);
    if (count == 0) return;
    Params params = params_;
    params.data = static_cast<uint2*>(data);
    params.num_words = static_cast<int>(count * bytes_of(type_) / kWordBytes);
    const int ctas = std::min((params.num_words + kThreads - 1) / kThreads, kMaxCtas);
    with_half_type(type_, [&](auto tag) {
      launch_overlapped(peer_sum_kernel<typename decltype(tag)::type>, ctas, kThreads, 0,
                        as_cuda(stream), params);
    });
  }

 private:
  DataType type_;
  Params params_{};
  std::byte* memory_ = nullptr;
  int* stop_ = nullptr;
  std::vector<void*> opened_;
};

}  // namespace
}  // namespace foretoken::kernels::cuda

namespace foretoken::kernels {

std::unique_ptr<PeerSum> make_peer_sum(Device& device, int rank, int world_size) {
  return std::make_unique<cuda::CudaPeerSum>(device, rank, world_size);
}

}  // namespace foretoken::kernels
