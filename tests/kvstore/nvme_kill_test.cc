// A store is killed while it writes, again and again, over the same file; what the next one finds
// is held against an oracle: each slab is right, and none is lost that was done.
//
// FORETOKEN_KILLS sets how many times at least (20).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cstdlib>
#include <random>
#include <thread>

#include "kvstore/internal/nvme_tier.h"
#include "tests/kvstore/running_server.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261124;

int num_kills() {
  const char* asked = std::getenv("FORETOKEN_KILLS");
  return asked != nullptr ? std::atoi(asked) : 20;
}

// Runs slab_writer for a while; the numbers that it was done with.
std::vector<std::uint32_t> run_and_kill(const std::string& folder, unsigned seed,
                                        std::chrono::microseconds life) {
  int ends[2] = {};
  if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
  const FileDescriptor in(ends[0]);
  FileDescriptor out(ends[1]);
  fcntl(in.get(), F_SETPIPE_SZ, 1 << 20);  // it never waits for us
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, out.get(), STDOUT_FILENO);
  std::string words[] = {SLAB_WRITER, folder, std::to_string(seed)};
  char* argv[] = {words[0].data(), words[1].data(), words[2].data(), nullptr};
  pid_t pid = 0;
  if (posix_spawn(&pid, SLAB_WRITER, &actions, nullptr, argv, environ) != 0) {
    throw std::runtime_error("posix_spawn");
  }
  posix_spawn_file_actions_destroy(&actions);
  out.reset();
  pollfd started{in.get(), POLLIN, 0};
  poll(&started, 1, 10'000);
  std::this_thread::sleep_for(life);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  std::vector<std::uint32_t> done;
  for (std::uint32_t number = 0; read(in.get(), &number, sizeof number) == sizeof number;) {
    done.push_back(number);
  }
  return done;
}

bool load(NvmeTier& tier, const SlabName& name) {
  const auto now = [] { return std::chrono::steady_clock::now(); };
  if (!tier.has(name, now())) return false;
  std::vector<std::byte> slab(kTestModel.slab_bytes());
  tier.load(name, slab.data(), now());
  for (;;) {
    for (const auto& loaded : tier.advance(now())) {
      EXPECT_TRUE(!loaded.is_whole || same_slab(slab.data(), name)) << "wrong KV was given";
      return loaded.is_whole;
    }
    pollfd ready{tier.completion_fd(), POLLIN, 0};
    if (!tier.has_more()) poll(&ready, 1, 10);
  }
}

TEST(NvmeKill, NothingWrongAndNothingDoneIsLost) {
  const TestFolder folder;
  std::mt19937 random(kSeed);
  const NvmeGeometry geometry = kill_test_geometry();
  std::vector<std::uint32_t> done;  // by all of them, in order
  // More on a slow machine: until the oldest have had to give way.
  for (int i = 0; i < num_kills() || done.size() <= geometry.num_slots; ++i) {
    const auto life = std::chrono::microseconds(random() % 30'000);
    for (const std::uint32_t number : run_and_kill(folder.path(), random(), life)) {
      done.push_back(number);
    }
    const NvmeFile file(folder.path());
    const auto tier =
        NvmeTier::open(file, {kTestModel, geometry.file_bytes(), 0, NvmeReuse::kKeepSlabs})
            .value_or_throw();
    // The oldest gave way: also to slabs that were written and not told of any more, one a death.
    const std::size_t safe = geometry.num_slots - 16;
    const std::size_t first = done.size() > safe ? done.size() - safe : 0;
    int lost = 0;
    for (std::size_t at = first; at < done.size(); ++at) {
      if (!load(*tier, test_name(0, done[at]))) ++lost;
    }
    EXPECT_EQ(lost, 0) << "kill " << i << ", seed " << kSeed;
    EXPECT_LE(tier->stat().checksum_failures, 1) << "the one that was being written";
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace foretoken::kvstore
