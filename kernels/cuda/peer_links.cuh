// PeerLinks: how products of one row add values up over the ranks of a PeerSum (gemv.cu), without a
// kernel of the sum's own: the one that makes values sends each to every rank, and the one that
// takes the sum receives them all.
//
// A value travels with the number of its call beside it, in one word: who finds the number has
// found the value, with no fence (as in peer_sum.cu). There are two boxes for each value and rank,
// used in turn: who sends call n is after the kernel that has received call n - 1, for which the
// others were after theirs that had received call n - 2. A number has 16 bits, so no word may be
// older than the last call of its box: all calls have the same columns.
#pragma once

#include <cstdint>

#include "kernels/cuda/loads.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/types.cuh"
#include "kernels/peer_sum.h"

namespace foretoken::kernels::cuda {

struct PeerLinks {
  static constexpr int kMaxColumns = 16384;
  static constexpr int kMaxCtas = 256;

  std::uint32_t* boxes[PeerSum::kMaxRanks];  // in each rank's memory: [2, rank, kMaxColumns]
  std::uint32_t* calls;                      // [kMaxCtas]: sent so far; of all CTAs the same
  const volatile int* stop;                  // in host memory: gives up waiting
  int rank;
  int world_size;
  int ranks_here;  // that share this GPU, and its SMs
};

// REQUIRES: `sum` is connected.
PeerLinks links_of(const PeerSum& sum);

// By one thread of each CTA that has sent, at its end.
__device__ inline void count_call(const PeerLinks& links, std::uint32_t call) {
  for (unsigned i = blockIdx.x; i < PeerLinks::kMaxCtas; i += gridDim.x) links.calls[i] = call;
}

__device__ inline std::uint32_t number_of(std::uint32_t call) { return (1 + call % 0xFFFF) << 16; }

__device__ inline std::size_t box_at(std::uint32_t call, int rank, int column) {
  const std::size_t box = call % 2 * PeerSum::kMaxRanks + static_cast<unsigned>(rank);
  return box * PeerLinks::kMaxColumns + static_cast<unsigned>(column);
}

template <typename T>
__device__ void send_to(const PeerLinks& links, int to, std::uint32_t call, int column,
                        float value) {
  const std::uint32_t word = (pack<T>(value, 0) & 0xFFFF) | number_of(call);
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(links.boxes[to] +
                                                           box_at(call, links.rank, column)),
               "r"(word)
               : "memory");
}

// Eight values of a call, as they come from one rank.
class Received {
 public:
  __device__ explicit Received(const std::uint32_t* from)
      : from_(reinterpret_cast<const uint4*>(from)) {
    load();
  }

  // Anything where it is told to stop.
  template <typename T>
  __device__ void add_to(float (&sum)[8], std::uint32_t number, const volatile int* stop) {
    constexpr int kTriesPerLook = 512;
    for (int tries = 1; !has_come(number); ++tries) {
      if (tries % kTriesPerLook == 0 && *stop != 0) break;
      load();
    }
    const std::uint32_t words[] = {low_.x,  low_.y,  low_.z,  low_.w,
                                   high_.x, high_.y, high_.z, high_.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += unpack<T>(words[i]).x;
  }

 private:
  __device__ void load() {
    low_ = load_awaited(from_);
    high_ = load_awaited(from_ + 1);
  }
  __device__ bool has_come(std::uint32_t number) const {
    const std::uint32_t differs = (low_.x ^ number) | (low_.y ^ number) | (low_.z ^ number) |
                                  (low_.w ^ number) | (high_.x ^ number) | (high_.y ^ number) |
                                  (high_.z ^ number) | (high_.w ^ number);
    return differs >> 16 == 0;
  }

  const uint4* from_;
  uint4 low_, high_;
};

// The sums of eight neighbouring columns, in the order of ranks, so that all get equal bits.
template <typename T>
__device__ uint4 receive_sum(const PeerLinks& links, std::uint32_t call, int column) {
  const std::uint32_t number = number_of(call);
  const auto from = [&](int rank) { return links.boxes[links.rank] + box_at(call, rank, column); };
  float sum[8] = {};
  for (int rank = 0; rank < links.world_size; rank += 2) {
    Received first(from(rank));
    Received second(from(min(rank + 1, links.world_size - 1)));
    first.add_to<T>(sum, number, links.stop);
    if (rank + 1 < links.world_size) second.add_to<T>(sum, number, links.stop);
  }
  return {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]), pack<T>(sum[4], sum[5]),
          pack<T>(sum[6], sum[7])};
}

}  // namespace foretoken::kernels::cuda
