#include "common/program.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

namespace foretoken {
namespace {

// How a child ends that forbids core dumps, where it may make some, and then does `last`.
int end_of_child(void (*last)()) {
  const pid_t child = fork();
  if (child == 0) {
    rlimit limit{};
    getrlimit(RLIMIT_CORE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_CORE, &limit);
    forbid_core_dumps();
    last();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

TEST(ForbidCoreDumps, ACrashDumpsNone) {
  // A signal that sanitizers make no finding of.
  const int status = end_of_child([] { std::abort(); });
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGABRT);
  EXPECT_FALSE(WCOREDUMP(status));
}

// 0 would be: no file, but the program of core_pattern is started.
TEST(ForbidCoreDumps, TheLimitIsOne) {
  rlimit ours{};
  getrlimit(RLIMIT_CORE, &ours);
  if (ours.rlim_max == 0) GTEST_SKIP() << "the limit is 0 here, for good";
  const int status = end_of_child([] {
    rlimit limit{};
    getrlimit(RLIMIT_CORE, &limit);
    _exit(limit.rlim_cur == 1 && limit.rlim_max == 1 ? 7 : 8);
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

}  // namespace
}  // namespace foretoken
