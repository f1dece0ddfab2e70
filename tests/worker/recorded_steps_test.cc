#include "worker/recorded_steps.h"

#include <gtest/gtest.h>

namespace foretoken::worker {
namespace {

class RecordedStepsTest : public testing::Test {
 protected:
  void run(int kind) {
    steps_.run(kind, *device_, *stream_, [this, alive = alive_] { ++num_run_; });
  }
  // The CPU's graph holds what it launches.
  long num_graphs() const { return alive_.use_count() - 1; }

  std::shared_ptr<int> alive_ = std::make_shared<int>();
  int num_run_ = 0;
  std::unique_ptr<kernels::Device> device_ = kernels::make_cpu_device({1, 1 << 20});
  std::unique_ptr<kernels::Stream> stream_ = device_->make_stream(kernels::StreamKind::kCompute);
  RecordedSteps<int> steps_{3};
};

TEST_F(RecordedStepsTest, TheSecondOfAKindIsRecorded) {
  run(1);
  EXPECT_EQ(num_graphs(), 0);
  run(1);
  EXPECT_EQ(num_graphs(), 1);
  run(1);
  EXPECT_EQ(num_graphs(), 1);
  EXPECT_EQ(num_run_, 3);
}

TEST_F(RecordedStepsTest, TheKindUsedLongestAgoIsForgotten) {
  for (const int kind : {1, 1, 2, 2, 3, 3, 1}) run(kind);
  EXPECT_EQ(num_graphs(), 3);
  run(4);  // in the place of 2
  EXPECT_EQ(num_graphs(), 2);
  for (const int kind : {1, 3, 4}) run(kind);
  EXPECT_EQ(num_graphs(), 3);
  run(2);  // anew: it only runs, in the place of 1
  EXPECT_EQ(num_graphs(), 2);
  EXPECT_EQ(num_run_, 12);
}

}  // namespace
}  // namespace foretoken::worker
