#include "launch/internal/process.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <thread>

#include "launch/internal/files.h"

namespace foretoken::launch {
namespace {

using namespace std::chrono_literals;

Command shell(const std::string& script) {
  return {.name = "shell", .argv = {"/bin/sh", "-c", script}};
}

bool is_alive(pid_t pid) { return kill(pid, 0) == 0; }

// A zombie counts as ended: nobody but its parent can reap it.
bool ends_within(pid_t pid, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (std::chrono::steady_clock::now() < deadline) {
    if (!is_alive(pid)) return true;
    std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
    std::string number, name, state;
    stat >> number >> name >> state;
    if (state == "Z") return true;
    std::this_thread::sleep_for(5ms);
  }
  return false;
}

pid_t read_pid(const std::filesystem::path& path) {
  for (int i = 0; i < 1000; ++i) {
    pid_t pid = 0;
    if (std::ifstream(path) >> pid) return pid;
    std::this_thread::sleep_for(5ms);
  }
  return 0;
}

TEST(Process, ReportsExitCodeAndSignal) {
  Process good(shell("exit 0"));
  EXPECT_TRUE(good.wait(10s)->ok());
  Process bad(shell("exit 3"));
  EXPECT_EQ(bad.wait(10s)->code, 3);
  EXPECT_EQ(bad.wait(10s)->describe(), "exited with code 3");
  EXPECT_EQ((ExitStatus{.code = 137, .signal = 0}.describe()),
            "exited with code 137 (signal 9, Killed)");
  Process killed(shell("kill -9 $$"));
  EXPECT_EQ(killed.wait(10s)->signal, SIGKILL);
}

TEST(Process, AnExitCodeOfOursIsAnError) {
  EXPECT_EQ((ExitStatus{.code = 4, .signal = 0}.error_code()), ErrorCode::kModelFile);
  EXPECT_EQ((ExitStatus{.code = 137, .signal = 0}.error_code()), ErrorCode::kInternal);
  EXPECT_EQ((ExitStatus{.code = 0, .signal = 9}.error_code()), ErrorCode::kInternal);
}

TEST(Process, ProgramThatIsNotThereEndsWith127) {
  Process absent({.name = "absent", .argv = {"/nowhere/program"}});
  EXPECT_EQ(absent.wait(10s)->code, 127);
  EXPECT_EQ(absent.wait(10s)->describe(), "exited with code 127 (its program can't be run)");
}

TEST(Process, WaitHasADeadline) {
  Process sleeper(shell("sleep 100"));
  EXPECT_FALSE(sleeper.wait(20ms));
  EXPECT_FALSE(sleeper.poll());
}

TEST(Process, CapturesOutputAndPassesEnvironment) {
  Command command = shell("echo $FORETOKEN_TEST");
  command.environment = {{"FORETOKEN_TEST", "hello"}};
  command.capture_output = true;
  Process process(command);
  ASSERT_TRUE(process.wait(10s));
  std::array<char, 64> buffer{};
  ASSERT_GT(read(process.output_fd(), buffer.data(), buffer.size()), 0);
  EXPECT_STREQ(buffer.data(), "hello\n");
  EXPECT_EQ(std::getenv("FORETOKEN_TEST"), nullptr);
}

TEST(Process, DestructorEndsTheWholeGroup) {
  const RuntimeFolder folder;
  const auto file = folder.path() / "pid";
  pid_t grandchild = 0;
  {
    Process process(shell("sleep 100 & echo $! > " + file.string() + "; wait"));
    grandchild = read_pid(file);
    ASSERT_GT(grandchild, 0);
  }
  EXPECT_TRUE(ends_within(grandchild, 10s));
}

TEST(Process, EndOfTheLeaderEndsItsGroup) {
  const RuntimeFolder folder;
  const auto file = folder.path() / "pid";
  Process process(shell("sleep 100 & echo $! > " + file.string()));
  ASSERT_TRUE(process.wait(10s));
  EXPECT_TRUE(ends_within(read_pid(file), 10s));
}

TEST(Process, TakesFromTheEnvironmentWhatItIsTold) {
  setenv("FORETOKEN_TEST_GONE", "here", 1);
  setenv("FORETOKEN_TEST_KEPT", "a=b", 1);
  Command command = shell("test -z \"$FORETOKEN_TEST_GONE\" -a \"$FORETOKEN_TEST_KEPT\" = a=b");
  command.unset = {"FORETOKEN_TEST_GONE"};
  Process process(command);
  EXPECT_TRUE(process.wait(10s)->ok());
  EXPECT_STREQ(std::getenv("FORETOKEN_TEST_GONE"), "here");
}

// The parent is killed with SIGKILL, and can do nothing about its child any more.
TEST(Process, DiesWithItsParent) {
  const RuntimeFolder folder;
  const auto file = folder.path() / "pid";
  const pid_t parent = fork();
  if (parent == 0) {
    Process child(shell("echo $$ > " + file.string() + "; exec sleep 100"));
    pause();
    _exit(0);
  }
  const pid_t child = read_pid(file);
  ASSERT_GT(child, 0);
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  EXPECT_TRUE(ends_within(child, 10s));
}

}  // namespace
}  // namespace foretoken::launch
