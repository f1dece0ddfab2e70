// A store is killed while it works, again and again, over the same file, at named points and at
// random times; what the next one finds is held against an oracle: each slab is right, and none is
// lost that was done.
//
// FORETOKEN_KILLS sets how many times at least (so that each point is met once).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <optional>
#include <random>
#include <thread>

#include "kvstore/internal/nvme_tier.h"
#include "tests/kvstore/dying_device.h"
#include "tests/kvstore/running_server.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261124;

int num_kills() {
  const char* asked = std::getenv("FORETOKEN_KILLS");
  return asked != nullptr ? std::atoi(asked) : static_cast<int>(kDeathPoints.size() * 4 / 3);
}

// So many of the file's slots may hold something else than what was done last: those that were
// lent hold nothing; a slab that another builds on, and those whose uses were saved, give way in
// another order than they were written in.
constexpr std::size_t kOutOfTurn = kLentSlots + 1 + 2 * kSavedUses;

class SlabWriter {
 public:
  explicit SlabWriter(std::vector<std::string> words) {
    int ends[2] = {};
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
    in_ = FileDescriptor(ends[0]);
    const FileDescriptor out(ends[1]);
    fcntl(in_.get(), F_SETPIPE_SZ, 1 << 20);  // it never waits for us
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out.get(), STDOUT_FILENO);
    words.insert(words.begin(), SLAB_WRITER);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    if (posix_spawn(&pid_, SLAB_WRITER, &actions, nullptr, argv.data(), environ) != 0) {
      throw std::runtime_error("posix_spawn");
    }
    posix_spawn_file_actions_destroy(&actions);
  }

  void kill_after(std::chrono::microseconds life) const {
    pollfd started{in_.get(), POLLIN, 0};
    poll(&started, 1, 10'000);
    std::this_thread::sleep_for(life);
    kill(pid_, SIGKILL);
  }
  // The numbers that it was done with. Waits for its end, which must be by SIGKILL.
  std::vector<std::uint32_t> done() {
    std::vector<std::uint32_t> numbers;
    for (std::uint32_t number = 0; read(in_.get(), &number, sizeof number) == sizeof number;) {
      numbers.push_back(number);
    }
    int status = 0;
    waitpid(pid_, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "status " << status;
    return numbers;
  }

 private:
  FileDescriptor in_;
  pid_t pid_ = 0;
};

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

class NvmeKill : public testing::TestWithParam<bool> {  // whether the file is encrypted
 protected:
  NvmeKill() {
    if (!GetParam()) return;
    key_file_ = folder_.path() / "key";
    std::ofstream(key_file_) << std::string(64, '7');
    std::filesystem::permissions(key_file_, std::filesystem::perms::owner_read);
    cipher_ = KvCipher::from_file(key_file_);
  }

  // One life over the file, and its death: three of four at a named point. Says which.
  std::string live_and_die() {
    if (++num_deaths_ % 4 == 0) {
      SlabWriter writer(words());
      writer.kill_after(std::chrono::microseconds(random_() % 30'000));
      note_done(writer);
      return "any time";
    }
    const DeathPoint& point = kDeathPoints[num_named_++ % kDeathPoints.size()];
    const unsigned most = point.during == During::kOpening ? 1 : 6;
    return die_at(point, 1 + random_() % most);
  }
  std::string die_at(const DeathPoint& point, unsigned count) {
    std::vector<std::string> all = words();
    all.insert(all.end(), {std::string(point.name), std::to_string(count)});
    SlabWriter writer(all);
    note_done(writer);
    return all[3] + " " + all[4];
  }

  void expect_that_all_is_there() const {
    const NvmeFile file(tier_folder());
    const auto tier = NvmeTier::open(file, kill_test_opening(cipher_)).value_or_throw();
    const std::size_t slots = kill_test_geometry(GetParam()).num_slots;
    int lost = 0;
    const std::size_t due = std::min(written_.size(), slots - kOutOfTurn);
    for (std::size_t at = written_.size() - due; at < written_.size(); ++at) {
      if (written_[at] && !load(*tier, test_name(0, *written_[at]))) ++lost;
    }
    EXPECT_EQ(lost, 0);
    EXPECT_LE(tier->stat().checksum_failures, 1) << "the one that was being written";
  }
  // So many that the oldest have had to give way.
  bool is_full() const { return written_.size() > 2 * kill_test_geometry(GetParam()).num_slots; }

  void start_over() {
    std::filesystem::remove_all(tier_folder());
    written_.clear();
  }

 private:
  std::string tier_folder() const { return folder_.path() / "kv"; }
  std::vector<std::string> words() { return {tier_folder(), std::to_string(random_()), key_file_}; }
  void note_done(SlabWriter& writer) {
    for (const std::uint32_t number : writer.done()) written_.push_back(number);
    written_.push_back(std::nullopt);
  }

  const TestFolder folder_;
  std::string key_file_;
  std::shared_ptr<const KvCipher> cipher_;
  std::mt19937 random_{kSeed};
  std::size_t num_deaths_ = 0;
  std::size_t num_named_ = 0;
  // By all of them, in order. A death may have written one more slab than it told of (nullopt).
  std::vector<std::optional<std::uint32_t>> written_;
};

TEST_P(NvmeKill, NothingWrongAndNothingDoneIsLost) {
  die_at(kDeathPoints.back(), 1);  // with a file that an opening finds
  for (int i = 0; i < num_kills() || !is_full(); ++i) {
    const std::string death = live_and_die();
    expect_that_all_is_there();
    ASSERT_FALSE(HasFailure()) << "kill " << i << " at " << death << ", seed " << kSeed;
  }
}

// Nothing is there yet; the next one lays the file out, or takes it as it is.
TEST_P(NvmeKill, AFileThatIsLaidOut) {
  for (const DeathPoint& point : kLayoutPoints) {
    start_over();
    die_at(point, 1);
    expect_that_all_is_there();
    live_and_die();
    expect_that_all_is_there();
    ASSERT_FALSE(HasFailure()) << point.name << ", seed " << kSeed;
  }
}

INSTANTIATE_TEST_SUITE_P(Files, NvmeKill, testing::Bool(), [](const auto& which) {
  return std::string(which.param ? "Encrypted" : "Plain");
});

}  // namespace
}  // namespace foretoken::kvstore
