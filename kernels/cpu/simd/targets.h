// Which instruction sets the SIMD files are compiled for: AVX2 (with FMA and F16C) and AVX-512.
// Highway picks one when the program runs. Include this before any header of Highway.
#pragma once

// Nothing older than AVX2 is worth compiling: require_supported_cpu() says so at start.
#define HWY_BASELINE_TARGETS HWY_AVX2

#include <hwy/detect_targets.h>

namespace foretoken::kernels::simd {

// Throws Exception(kDevice) on a processor that lacks AVX2, FMA or F16C.
void require_supported_cpu();

}  // namespace foretoken::kernels::simd
