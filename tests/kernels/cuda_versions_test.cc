#include <gtest/gtest.h>

#include "kernels/cuda_machine.h"

namespace foretoken::kernels {
namespace {

TEST(CudaVersions, ADriverTakesProgramsOfItsMajorVersionAndOlderOnes) {
  EXPECT_EQ(why_driver_is_too_old({.driver = 13000, .program = 13000}), "");
  EXPECT_EQ(why_driver_is_too_old({.driver = 13000, .program = 13020}), "");
  EXPECT_EQ(why_driver_is_too_old({.driver = 14010, .program = 13000}), "");
}

TEST(CudaVersions, AnOlderDriverIsNamedWithWhatIsNeeded) {
  EXPECT_EQ(why_driver_is_too_old({.driver = 12080, .program = 13000}),
            "the NVIDIA driver is too old: it takes CUDA up to 12.8, this program needs 13.0: "
            "update it");
}

}  // namespace
}  // namespace foretoken::kernels
