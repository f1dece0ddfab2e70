// Reductions over a cluster of CTAs (up to 8 SMs that reach each other's shared memory).
#pragma once

#include <cooperative_groups.h>

#include <cstdint>
#include <cstring>

namespace foretoken::kernels::cuda {

__device__ inline int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
// Also makes what any thread of the cluster wrote, to global memory too, visible to all of them: so
// it waits for the whole device's caches, and empties the SMs' own.
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// The same shared variable in the CTA of `rank`.
template <typename T>
__device__ T* at_rank(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}

template <typename T>
__device__ T shuffle_xor(T value, int offset) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  for (unsigned& word : words) word = __shfl_xor_sync(~0U, word, offset);
  memcpy(&value, words, sizeof value);
  return value;
}

// Reduces values of up to 16 bytes over all threads of a CTA or of the cluster, in an order that
// only the shape fixes. op is commutative. All threads call, all get the result.
template <int kThreads, int kCtas>
class Reducer {
 public:
  struct Memory {  // shared
    alignas(16) unsigned char warps[kThreads / 32][16];
    alignas(16) unsigned char posted[2][16];
  };
  __device__ explicit Reducer(Memory& memory) : memory_(memory) {}

  template <typename T, typename Op>
  __device__ T over_cta(T value, Op op) {
    static_assert(sizeof(T) <= 16);
    for (int offset = 16; offset > 0; offset /= 2) value = op(value, shuffle_xor(value, offset));
    __syncthreads();  // the reduction before has been read
    if (threadIdx.x % 32 == 0) *reinterpret_cast<T*>(memory_.warps[threadIdx.x / 32]) = value;
    __syncthreads();
    value = *reinterpret_cast<const T*>(memory_.warps[0]);
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      value = op(value, *reinterpret_cast<const T*>(memory_.warps[warp]));
    }
    return value;
  }

  template <typename T, typename Op>
  __device__ T over_cluster(T value, Op op) {
    T* posted = post(over_cta(value, op));
    value = *at_rank(posted, 0);
    for (int rank = 1; rank < kCtas; ++rank) value = op(value, *at_rank(posted, rank));
    return value;
  }

  // Shows a value of this CTA to the others: at_rank(post(value), rank). There are two places in
  // turn, so that nobody overwrites what others may still read: who comes to the next but one has
  // waited for all in between.
  template <typename T>
  __device__ T* post(T value) {
    turn_ ^= 1;
    T* posted = reinterpret_cast<T*>(memory_.posted[turn_]);
    if (threadIdx.x == 0) *posted = value;
    cluster_sync();
    return posted;
  }

 private:
  Memory& memory_;
  int turn_ = 0;
};

// Shows each CTA of a cluster a value of every CTA, once, in a fraction of cluster_sync()'s time:
// the values come with the news of their arrival, and nothing else is made visible. All threads
// call begin(), await_peers() and await(), in this order.
template <typename T, int kCtas>
class Exchange {
 public:
  struct Memory {  // shared
    alignas(16) T posted[kCtas];
    alignas(8) std::uint64_t arrived;
  };
  __device__ explicit Exchange(Memory& memory) : memory_(memory) {}

  __device__ void begin() {
    if (threadIdx.x == 0) {
      // The fence shows the barrier to the peers, who wait for the arrival below.
      asm volatile(
          "mbarrier.init.shared::cta.b64 [%0], 1;\n"
          "fence.mbarrier_init.release.cluster;" ::"r"(address(&memory_.arrived))
          : "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  // Returns when the peers' shared memory takes values.
  __device__ void await_peers() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

  // Shows `rank` this CTA's value. One thread a rank calls it.
  __device__ void post(const T& value, int rank) {
    static_assert(sizeof(T) == 16);
    uint4 words;
    memcpy(&words, &value, sizeof words);
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(address(&memory_.posted[cluster_rank()], rank)),
        "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(address(&memory_.arrived, rank))
        : "memory");
  }

  // The values, by rank. A CTA whose await() has returned may end: all that the others send it has
  // come.
  __device__ const T* await() const {
    // The barrier's one arrival; values that came before it count too. It isn't right behind the
    // init, an instruction of the warp, as racecheck wants a barrier between that and one thread's.
    if (threadIdx.x == 0) {
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&memory_.arrived)),
          "r"(static_cast<int>(kCtas * sizeof(T)))
          : "memory");
    }
    unsigned done = 0;
    while (done == 0) {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(address(&memory_.arrived))
          : "memory");
    }
    return memory_.posted;
  }

 private:
  template <typename U>
  __device__ static unsigned address(const U* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
  }
  // In the CTA of `rank`.
  template <typename U>
  __device__ static unsigned address(const U* shared, int rank) {
    unsigned there = 0;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(shared)), "r"(rank));
    return there;
  }

  Memory& memory_;
};

}  // namespace foretoken::kernels::cuda
