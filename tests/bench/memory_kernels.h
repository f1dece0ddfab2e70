// Plain kernels that stream device memory: what the chip gives, for a roofline of the same run.
#pragma once

#include <cstddef>

#include "kernels/device.h"

namespace foretoken::kernels {

inline constexpr std::size_t kMemoryKernelStep = std::size_t{32} << 10;

// REQUIRES of both: device memory of a CUDA device's stream, 16-byte aligned; bytes is a multiple
// of kMemoryKernelStep. They enqueue and return.
void copy_memory(void* to, const void* from, std::size_t bytes, Stream& stream);
// *sink is written only where the words' xor is all ones, which the compiler can't rule out.
void read_memory(const void* from, std::size_t bytes, unsigned* sink, Stream& stream);

}  // namespace foretoken::kernels
