#include "kernels/cpu/simd/targets.h"

#include <hwy/targets.h>

#include "common/result.h"

namespace foretoken::kernels::simd {

void require_supported_cpu() {
  if ((hwy::SupportedTargets() & (HWY_AVX2 | (HWY_AVX2 - 1))) != 0) return;
  throw Exception(ErrorCode::kDevice,
                  "this processor lacks AVX2, FMA or F16C, which the CPU device needs");
}

}  // namespace foretoken::kernels::simd
