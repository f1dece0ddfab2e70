#include "coordinator/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace foretoken::coordinator {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(Metrics, AStoreWithoutAnNvmeTierHasNoStateOfIt) {
  Metrics metrics("m");
  metrics.set_nvme({});
  EXPECT_THAT(metrics.text(), Not(HasSubstr("foretoken_kv_nvme_state")));
}

TEST(Metrics, CountsOfTheNvmeTierOnlyRise) {
  Metrics metrics("m");
  metrics.set_nvme({.state = "online", .slabs_held = 7, .bytes_read = 100, .checksum_failures = 2});
  metrics.set_nvme(
      {.state = "offline", .slabs_held = 5, .bytes_read = 150, .checksum_failures = 2});
  metrics.set_nvme({.state = "online", .slabs_held = 4, .bytes_read = 120});  // of before that
  metrics.set_nvme({.state = "online", .slabs_held = 1, .bytes_read = 165, .checksum_failures = 2});
  const std::string text = metrics.text();
  EXPECT_THAT(text, HasSubstr("foretoken_kv_nvme_state{model_name=\"m\",state=\"online\"} 1"));
  EXPECT_THAT(text, HasSubstr("foretoken_kv_nvme_state{model_name=\"m\",state=\"offline\"} 0"));
  EXPECT_THAT(text, HasSubstr("foretoken_kv_nvme_slabs{model_name=\"m\"} 1"));
  EXPECT_THAT(text, HasSubstr("foretoken_kv_nvme_read_bytes_total{model_name=\"m\"} 165"));
  EXPECT_THAT(text,
              HasSubstr("foretoken_kv_checksum_failures_total{model_name=\"m\",tier=\"nvme\"} 2"));
}

TEST(Metrics, CountsRequestsThatSpilled) {
  Metrics metrics("m");
  KvReport kv;
  metrics.on_released(kv);
  kv.spilled = true;
  metrics.on_released(kv);
  EXPECT_THAT(metrics.text(), HasSubstr("foretoken_spilled_requests_total{model_name=\"m\"} 1"));
}

}  // namespace
}  // namespace foretoken::coordinator
