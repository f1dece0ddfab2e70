#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <numeric>
#include <string>
#include <string_view>

#include "common/check.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/peer_links.cuh"
#include "kernels/cuda/types.cuh"
#include "kernels/peer_sum.h"
#include "kernels/poll.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxCtas = 32;
constexpr std::size_t kWordBytes = 8;  // of values; 16 on the way
constexpr int kWordFloats = kWordBytes / sizeof(float);
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

// ---- parts of all ranks, joined ----

struct GatherParams {
  const uint2* part;
  uint2* all;
  int first[PeerSum::kMaxRanks + 1];  // a rank's first word, and where the last one ends
  Params link;                        // but for its data
};

// A CTA has a run of each rank's words, and counts as those of a sum do.
__global__ void __launch_bounds__(kThreads) peer_gather_kernel(const GatherParams p) {
  allow_next_kernel();
  const Params& link = p.link;
  const int cta = blockIdx.x;
  wait_for_earlier_kernels();
  const std::uint32_t call = link.calls[cta] + 1;
  // Calls f(word of the rank's, its place in the CTA's run).
  const auto for_each = [&](int rank, const auto& f) {
    const int count = p.first[rank + 1] - p.first[rank];
    const int per_cta = (count + gridDim.x - 1) / gridDim.x;
    const int end = min(count, (cta + 1) * per_cta);
    for (int word = cta * per_cta + threadIdx.x; word < end; word += kThreads) {
      f(word, word - cta * per_cta);
    }
  };
  for_each(link.rank, [&](int word, int at) {
    const uint2 values = p.part[word];
    for (int step = 1; step < link.world_size; ++step) {
      const int to = (link.rank + step) % link.world_size;
      send(link.inboxes[to] + inbox_at(call, cta, link.rank, at), values, call);
    }
    p.all[p.first[link.rank] + word] = values;
  });
  for (int step = 1; step < link.world_size; ++step) {
    const int from = (link.rank + step) % link.world_size;
    for_each(from, [&](int word, int at) {
      p.all[p.first[from] + word] =
          receive(link.inboxes[link.rank] + inbox_at(call, cta, from, at), call, link.stop);
    });
  }
  __syncthreads();
  if (threadIdx.x == 0) link.calls[cta] = call;
}

// ---- in two steps ----

constexpr int kPlaces = 4;
constexpr std::size_t kLeastBegun = std::size_t{1} << 20;  // below it NCCL is as fast (guessed)
constexpr std::size_t kLine = 128;
constexpr std::uint32_t kNumbers = 1024;  // calls until a number comes again
constexpr int kLargeCtasOfSm = 2;
constexpr int kLargeThreads = 512;

std::size_t round_up(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Where what lies in a rank's memory; all ranks' alike.
struct Layout {
  std::size_t most_bytes;  // of a place

  static constexpr std::size_t inbox_bytes() {
    return sizeof(uint4) * 2 * kMaxCtas * PeerSum::kMaxRanks * std::size_t{kWordsPerCta};
  }
  static constexpr std::size_t calls() { return inbox_bytes(); }
  static constexpr std::size_t boxes() { return calls() + kMaxCtas * sizeof(std::uint32_t); }
  static constexpr std::size_t chain_calls() {
    return boxes() +
           sizeof(std::uint32_t) * 2 * PeerSum::kMaxRanks * std::size_t{PeerLinks::kMaxColumns};
  }
  static constexpr std::size_t numbers() {
    return chain_calls() + PeerLinks::kMaxCtas * sizeof(std::uint32_t);
  }
  static constexpr std::size_t flags() { return numbers() + kNumbers * sizeof(std::uint32_t); }
  std::size_t flag(std::uint32_t call) const { return flags() + call % kPlaces * kLine; }
  std::size_t place(std::uint32_t call) const {
    return flags() + kPlaces * kLine + call % kPlaces * round_up(most_bytes);
  }
  std::size_t bytes() const { return place(kPlaces - 1) + round_up(most_bytes); }
};
static_assert(Layout::flags() % kLine == 0);

struct LargeParams {
  uint4* data;
  const uint4* other;
  std::size_t num_words;  // of 16 bytes
  const std::uint32_t* flag;
  std::uint32_t number;
  const volatile int* stop;
};

__device__ std::uint32_t load_acquire(const std::uint32_t* from) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

template <typename T>
__device__ std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
  const float2 x = unpack<T>(a);
  const float2 y = unpack<T>(b);
  return pack<T>(x.x + y.x, x.y + y.y);
}

// Of two values both ranks get the same sum, in whatever order.
template <typename T>
__global__ void __launch_bounds__(kLargeThreads) large_sum_kernel(const LargeParams p) {
  if (threadIdx.x == 0) {
    constexpr int kTriesPerLook = 4096;
    for (int i = 0; load_acquire(p.flag) != p.number; ++i) {
      if (i % kTriesPerLook == 0 && *p.stop != 0) break;
    }
  }
  __syncthreads();
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kLargeThreads;
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(kLargeThreads) + threadIdx.x;
       i < p.num_words; i += step) {
    const uint4 own = p.data[i];
    const uint4 other = __ldcg(p.other + i);
    p.data[i] = {add_pairs<T>(own.x, other.x), add_pairs<T>(own.y, other.y),
                 add_pairs<T>(own.z, other.z), add_pairs<T>(own.w, other.w)};
  }
}

// What an Address holds.
struct Inbox {
  cudaIpcMemHandle_t handle;  // for other processes
  uint4* memory;              // in that one:
  pid_t process;
  char gpu[16];
};
static_assert(sizeof(Inbox) <= sizeof(PeerSum::Address));

class CudaPeerSum final : public PeerSum {
 public:
  CudaPeerSum(Device& device, int rank, int world_size, const PeerSumSizes& sizes)
      : device_(static_cast<CudaDevice&>(device)),
        type_(device.activation_type()),
        layout_{world_size == 2 ? sizes.most_bytes : 0},
        chain_columns_(sizes.chain_columns) {
    FT_CHECK(world_size <= kMaxRanks, world_size);
    FT_CHECK(num_sms() <= PeerLinks::kMaxCtas, num_sms());
    params_.rank = rank;
    params_.world_size = world_size;
    memory_ =
        static_cast<std::byte*>(device_.allocate_for_peers(layout_.bytes(), MemoryUse::kSums));
    FT_CUDA(cudaMemset(memory_, 0, layout_.bytes()));
    params_.inboxes[rank] = reinterpret_cast<uint4*>(memory_);
    params_.calls = reinterpret_cast<std::uint32_t*>(memory_ + Layout::calls());
    std::array<std::uint32_t, kNumbers> numbers{};
    std::iota(numbers.begin(), numbers.end(), 1U);
    FT_CUDA(cudaMemcpy(memory_ + Layout::numbers(), numbers.data(), sizeof numbers,
                       cudaMemcpyHostToDevice));
    FT_CUDA(cudaStreamCreateWithFlags(&sender_, cudaStreamNonBlocking));
    FT_CUDA(cudaEventCreateWithFlags(&made_, cudaEventDisableTiming));
    for (Begun& slot : slots_) {
      FT_CUDA(cudaEventCreateWithFlags(&slot.sent, cudaEventDisableTiming));
    }
    FT_CUDA(cudaHostAlloc(&stop_, sizeof *stop_, cudaHostAllocMapped));
    *stop_ = 0;
    int* on_device = nullptr;
    FT_CUDA(cudaHostGetDevicePointer(&on_device, stop_, 0));
    params_.stop = on_device;
    FT_CUDA(cudaDeviceSynchronize());  // the zeros are there before anyone is told the address
  }
  ~CudaPeerSum() override {
    disconnect();
    cudaStreamDestroy(sender_);
    cudaEventDestroy(made_);
    for (const Begun& slot : slots_) cudaEventDestroy(slot.sent);
    // After what still runs on the device.
    device_.release_for_peers(memory_, layout_.bytes(), MemoryUse::kSums);
    cudaFreeHost(stop_);
  }
  CudaPeerSum(const CudaPeerSum&) = delete;
  CudaPeerSum& operator=(const CudaPeerSum&) = delete;

  Address address() const override {
    Inbox inbox{
        .handle = {}, .memory = params_.inboxes[params_.rank], .process = getpid(), .gpu = {}};
    gpu_.copy(inbox.gpu, sizeof inbox.gpu);
    FT_CUDA(cudaIpcGetMemHandle(&inbox.handle, memory_));
    Address address{};
    std::memcpy(address.data(), &inbox, sizeof inbox);
    return address;
  }

  void connect(std::span<const Address> addresses) override {
    FT_CHECK(static_cast<int>(addresses.size()) == params_.world_size, addresses.size());
    links_.ranks_here = 0;
    for (int rank = 0; rank < params_.world_size; ++rank) {
      Inbox inbox{};
      std::memcpy(&inbox, addresses[static_cast<std::size_t>(rank)].data(), sizeof inbox);
      if (std::string_view(inbox.gpu, sizeof inbox.gpu) == gpu_) ++links_.ranks_here;
      if (rank == params_.rank) continue;
      void* memory = inbox.memory;
      if (inbox.process != getpid()) {
        FT_CUDA(cudaIpcOpenMemHandle(&memory, inbox.handle, cudaIpcMemLazyEnablePeerAccess));
        opened_.push_back(memory);
      }
      params_.inboxes[rank] = static_cast<uint4*>(memory);
    }
  }
  void disconnect() override {
    *stop_ = 1;
    // What is on its way to another's memory ends first; a link that hangs does not hold us.
    poll_until([this] { return cudaStreamQuery(sender_) != cudaErrorNotReady; }, kEndLimits, [] {});
    for (void* memory : opened_) cudaIpcCloseMemHandle(memory);
    opened_.clear();
  }

  bool takes(std::size_t count) const override {
    const std::size_t bytes = count * bytes_of(type_);
    return bytes <= kMaxBytes && bytes % kWordBytes == 0;
  }

  bool takes_in_chain(int columns) const override {
    return columns == chain_columns_ && columns % 8 == 0 && columns <= PeerLinks::kMaxColumns;
  }

  PeerLinks links() const {
    PeerLinks links = links_;
    links.calls = reinterpret_cast<std::uint32_t*>(memory_ + Layout::chain_calls());
    links.stop = params_.stop;
    links.rank = params_.rank;
    links.world_size = params_.world_size;
    for (int rank = 0; rank < params_.world_size; ++rank) {
      auto* memory = reinterpret_cast<std::byte*>(params_.inboxes[rank]);
      links.boxes[rank] = reinterpret_cast<std::uint32_t*>(memory + Layout::boxes());
    }
    return links;
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

  bool gathers(std::span<const int> widths) const override {
    return std::ranges::all_of(widths, [](int width) {
      return width > 0 && width % kWordFloats == 0 && width * sizeof(float) <= kMaxBytes;
    });
  }

  void gather(const float* part, float* all, std::span<const int> widths, Stream& stream) override {
    FT_CHECK(gathers(widths) && static_cast<int>(widths.size()) == params_.world_size,
             widths.size());
    GatherParams params{};
    params.part = reinterpret_cast<const uint2*>(part);
    params.all = reinterpret_cast<uint2*>(all);
    params.link = params_;
    int most = 0;
    for (std::size_t rank = 0; rank < widths.size(); ++rank) {
      const int words = widths[rank] / kWordFloats;
      params.first[rank + 1] = params.first[rank] + words;
      most = std::max(most, words);
    }
    const int ctas = std::min((most + kThreads - 1) / kThreads, kMaxCtas);
    launch_overlapped(peer_gather_kernel, ctas, kThreads, 0, as_cuda(stream), params);
  }

  bool begins(std::size_t count) const override {
    const std::size_t bytes = count * bytes_of(type_);
    return bytes >= kLeastBegun && bytes <= layout_.most_bytes && bytes % sizeof(uint4) == 0;
  }

  void begin(void* data, std::size_t count, Stream& stream) override {
    FT_CHECK(begins(count) && num_begun_ - num_ended_ < kMaxBegun, count);
    const std::uint32_t call = num_begun_++;
    Begun& slot = slots_[call % kMaxBegun];
    slot.data = data;
    slot.bytes = count * bytes_of(type_);
    FT_CUDA(cudaEventRecord(made_, as_cuda(stream).handle()));
    FT_CUDA(cudaStreamWaitEvent(sender_, made_, 0));
    auto* other = reinterpret_cast<std::byte*>(params_.inboxes[1 - params_.rank]);
    FT_CUDA(
        cudaMemcpyAsync(other + layout_.place(call), data, slot.bytes, cudaMemcpyDefault, sender_));
    FT_CUDA(cudaMemcpyAsync(other + layout_.flag(call),
                            memory_ + Layout::numbers() + call % kNumbers * sizeof(std::uint32_t),
                            sizeof(std::uint32_t), cudaMemcpyDefault, sender_));
    FT_CUDA(cudaEventRecord(slot.sent, sender_));
  }

  void end(Stream& stream) override {
    FT_CHECK(num_ended_ < num_begun_);
    const std::uint32_t call = num_ended_++;
    const Begun& slot = slots_[call % kMaxBegun];
    const cudaStream_t handle = as_cuda(stream).handle();
    FT_CUDA(cudaStreamWaitEvent(handle, slot.sent, 0));
    const LargeParams params{reinterpret_cast<uint4*>(slot.data),
                             reinterpret_cast<const uint4*>(memory_ + layout_.place(call)),
                             slot.bytes / sizeof(uint4),
                             reinterpret_cast<const std::uint32_t*>(memory_ + layout_.flag(call)),
                             number(call),
                             params_.stop};
    with_half_type(type_, [&](auto tag) {
      large_sum_kernel<typename decltype(tag)::type>
          <<<kLargeCtasOfSm * num_sms(), kLargeThreads, 0, handle>>>(params);
    });
    FT_CUDA(cudaGetLastError());
  }

 private:
  struct Begun {
    void* data = nullptr;
    std::size_t bytes = 0;
    cudaEvent_t sent = nullptr;
  };
  static std::uint32_t number(std::uint32_t call) { return 1 + call % kNumbers; }
  static std::string own_gpu() {
    int index = 0;
    FT_CUDA(cudaGetDevice(&index));
    return cuda_device_id(index);
  }

  CudaDevice& device_;
  DataType type_;
  Layout layout_;
  int chain_columns_;
  const std::string gpu_ = own_gpu();
  cudaStream_t sender_ = nullptr;
  cudaEvent_t made_ = nullptr;
  std::array<Begun, kMaxBegun> slots_;
  std::uint32_t num_begun_ = 0;
  std::uint32_t num_ended_ = 0;
  Params params_{};
  PeerLinks links_{};
  std::byte* memory_ = nullptr;
  int* stop_ = nullptr;
  std::vector<void*> opened_;
};

}  // namespace

PeerLinks links_of(const PeerSum& sum) { return static_cast<const CudaPeerSum&>(sum).links(); }

}  // namespace foretoken::kernels::cuda

namespace foretoken::kernels {

std::unique_ptr<PeerSum> make_peer_sum(Device& device, int rank, int world_size,
                                       const PeerSumSizes& sizes) {
  return std::make_unique<cuda::CudaPeerSum>(device, rank, world_size, sizes);
}

}  // namespace foretoken::kernels
