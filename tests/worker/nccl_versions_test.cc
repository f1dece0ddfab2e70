#include "worker/internal/nccl_versions.h"

#include <gtest/gtest.h>

#include <vector>

namespace foretoken::worker {
namespace {

constexpr int kBuilt = 22809;

std::string refusal_of(const std::vector<int>& loaded) {
  const Status status = check_nccl_versions(loaded, kBuilt);
  if (status) return "";
  EXPECT_EQ(status.error().code, ErrorCode::kDevice);
  return status.error().message;
}

TEST(NcclVersions, PatchesAndNewerOnesFit) {
  EXPECT_EQ(refusal_of({22803, 22803}), "");
  EXPECT_EQ(refusal_of({22809}), "");
  EXPECT_EQ(refusal_of({23001, 23001, 23001}), "");
}

TEST(NcclVersions, AnOlderOneIsNamedWithItsRank) {
  const std::string refusal = refusal_of({22809, 22705});
  EXPECT_NE(refusal.find("rank 1"), std::string::npos) << refusal;
  EXPECT_NE(refusal.find("2.27.5"), std::string::npos) << refusal;
  EXPECT_NE(refusal.find("built with 2.28.9"), std::string::npos) << refusal;
  EXPECT_NE(refusal_of({12809}), "");
}

TEST(NcclVersions, UnequalOnesAreNamedWithTheirRanks) {
  const std::string refusal = refusal_of({22809, 22809, 22803});
  EXPECT_NE(refusal.find("rank 0 has loaded NCCL 2.28.9"), std::string::npos) << refusal;
  EXPECT_NE(refusal.find("rank 2 2.28.3"), std::string::npos) << refusal;
}

}  // namespace
}  // namespace foretoken::worker
