#include "launch/internal/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace foretoken::launch {
namespace {

constexpr int kExecFailed = 127;

// Runs in the child, between fork and exec: only calls that are safe there.
[[noreturn]] void become(const Command& command, char* const* argv, pid_t parent, int output) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, command.parent_death_signal);
  if (getppid() != parent) _exit(kExecFailed);  // it died before the line above
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  signal(SIGPIPE, SIG_DFL);
  const int empty = open("/dev/null", O_RDONLY);
  if (empty >= 0) dup2(empty, STDIN_FILENO);
  dup2(output, STDOUT_FILENO);
  if (command.nice != 0) setpriority(PRIO_PROCESS, 0, command.nice);
  execvp(argv[0], argv);
  const char* reason = std::strerror(errno);
  for (const char* part :
       {"foretoken: can't run ", static_cast<const char*>(argv[0]), ": ", reason, "\n"}) {
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) break;
  }
  _exit(kExecFailed);
}

// The environment is set in ourselves around fork, as execvp has no argument for it and $PATH
// counts: we are single-threaded when we start children.
class ScopedEnvironment {
 public:
  explicit ScopedEnvironment(const Command& command) {
    for (const auto& [name, value] : command.environment) set(name, &value);
    for (const auto& name : command.unset) set(name, nullptr);
  }
  ~ScopedEnvironment() {
    for (auto it = before_.rbegin(); it != before_.rend(); ++it) {
      if (it->second) {
        setenv(it->first.c_str(), it->second->c_str(), 1);
      } else {
        unsetenv(it->first.c_str());
      }
    }
  }
  ScopedEnvironment(const ScopedEnvironment&) = delete;
  ScopedEnvironment& operator=(const ScopedEnvironment&) = delete;

 private:
  void set(const std::string& name, const std::string* value) {
    const char* old = std::getenv(name.c_str());
    before_.emplace_back(name, old == nullptr ? std::nullopt : std::optional<std::string>(old));
    if (value != nullptr) {
      setenv(name.c_str(), value->c_str(), 1);
    } else {
      unsetenv(name.c_str());
    }
  }
  std::vector<std::pair<std::string, std::optional<std::string>>> before_;
};

ExitStatus to_exit_status(int raw) {
  if (WIFSIGNALED(raw)) return {.code = 0, .signal = WTERMSIG(raw)};
  return {.code = WEXITSTATUS(raw), .signal = 0};
}

}  // namespace

std::string ExitStatus::describe() const {
  if (signal != 0) {
    return "was ended by signal " + std::to_string(signal) + " (" + strsignal(signal) + ")";
  }
  // As shells and mpirun tell of a child that a signal ended.
  constexpr int kSignalBase = 128;
  const std::string text = "exited with code " + std::to_string(code);
  if (code <= kSignalBase || code >= kSignalBase + NSIG) return text;
  return text + " (signal " + std::to_string(code - kSignalBase) + ", " +
         strsignal(code - kSignalBase) + ")";
}

Process::Process(const Command& command) : name_(command.name) {
  FT_CHECK(!command.argv.empty());
  std::vector<char*> argv;
  for (const std::string& word : command.argv) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  int output[2] = {-1, STDERR_FILENO};
  if (command.capture_output && pipe2(output, O_CLOEXEC) != 0) {
    throw Exception(ErrorCode::kIo, std::string("pipe failed: ") + std::strerror(errno));
  }
  output_fd_ = output[0];
  const pid_t parent = getpid();
  const ScopedEnvironment environment(command);
  pid_ = fork();
  if (pid_ == 0) become(command, argv.data(), parent, output[1]);
  if (command.capture_output) {
    close(output[1]);
    fcntl(output_fd_, F_SETFL, O_NONBLOCK);
  }
  if (pid_ < 0) {
    throw Exception(ErrorCode::kIo, "can't start " + name_ + ": " + std::strerror(errno));
  }
  setpgid(pid_, pid_);  // also here: whoever comes first
  // By number: glibc 2.36 declares pidfd_open() for C only.
  pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  if (pidfd_ < 0) {
    kill(-pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    throw Exception(ErrorCode::kIo, std::string("pidfd_open failed: ") + std::strerror(errno));
  }
}

Process::~Process() {
  if (!poll()) {
    signal_group(SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  close(pidfd_);
  if (output_fd_ >= 0) close(output_fd_);
}

std::optional<ExitStatus> Process::poll() {
  if (ended_) return ended_;
  siginfo_t info{};
  if (waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) != 0) return {};
  if (info.si_pid != pid_) return std::nullopt;
  // What it left in its group has nobody else to end it. Before reaping, while the group's number
  // can't be another's.
  kill(-pid_, SIGKILL);
  int raw = 0;
  waitpid(pid_, &raw, 0);
  ended_ = to_exit_status(raw);
  return ended_;
}

std::optional<ExitStatus> Process::wait(std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!poll()) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return std::nullopt;
    pollfd waiting{.fd = pidfd_, .events = POLLIN, .revents = 0};
    ::poll(&waiting, 1, static_cast<int>(left.count()));
  }
  return ended_;
}

void Process::signal(int number) {
  if (!poll()) kill(pid_, number);
}

void Process::signal_group(int number) {
  if (!poll()) kill(-pid_, number);
}

}  // namespace foretoken::launch
