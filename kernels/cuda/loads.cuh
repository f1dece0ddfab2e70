// Loads from device memory that say more than an expression can.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace foretoken::kernels::cuda {

// 16 bytes that are read once: past L1.
__device__ inline uint4 load_once(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// By all threads of a CTA: brings back into L2 what the weights have driven out. No access: it may
// come before wait_for_earlier_kernels().
__device__ inline void prefetch(const void* from, std::size_t bytes) {
  constexpr std::size_t kLine = 128;
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  const std::uintptr_t end = address + bytes;
  for (std::uintptr_t line = address / kLine * kLine + kLine * threadIdx.x; line < end;
       line += kLine * blockDim.x) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
}

// 16 or 8 bytes that others may be writing, in one load: a word is what it was or what it is.
template <typename Words>
__device__ Words load_awaited(const Words* from) {
  Words value;
  if constexpr (sizeof(Words) == 16) {
    uint4 words;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
    memcpy(&value, &words, sizeof value);
  } else {
    uint2 words;
    asm volatile("ld.volatile.global.v2.u32 {%0,%1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "l"(from)
                 : "memory");
    static_assert(sizeof value == sizeof words);
    memcpy(&value, &words, sizeof value);
  }
  return value;
}

}  // namespace foretoken::kernels::cuda
