#include "launch/internal/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>

namespace foretoken::launch {
namespace {

constexpr int kExecFailed = 127;

// Runs in the child, between fork and exec: only calls that are safe there.
[[noreturn]] void run_child(const Command& command, char* const* argv, char* const* environment,
                            pid_t parent, int output) {
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
  execvpe(argv[0], argv, environment);
  const char* reason = std::strerror(errno);
  for (const char* part :
       {"foretoken: can't run ", static_cast<const char*>(argv[0]), ": ", reason, "\n"}) {
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) break;
  }
  _exit(kExecFailed);
}

// Ours, without what the command takes and with what it adds: "NAME=value" each.
std::vector<std::string> environment_for(const Command& command) {
  std::map<std::string, std::string> values;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const auto end_of_name = text.find('=');
    if (end_of_name != std::string::npos) {
      values[text.substr(0, end_of_name)] = text.substr(end_of_name + 1);
    }
  }
  for (const auto& name : command.unset) values.erase(name);
  for (const auto& [name, value] : command.environment) values[name] = value;
  std::vector<std::string> entries;
  for (const auto& [name, value] : values) entries.push_back(name + "=" + value);
  return entries;
}

// As exec wants them. Valid as long as `words`.
std::vector<char*> pointers_to(const std::vector<std::string>& words) {
  std::vector<char*> pointers;
  for (const std::string& word : words) pointers.push_back(const_cast<char*>(word.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

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
  if (code == kExecFailed) return text + " (its program can't be run)";
  if (code <= kSignalBase || code >= kSignalBase + NSIG) return text;
  return text + " (signal " + std::to_string(code - kSignalBase) + ", " +
         strsignal(code - kSignalBase) + ")";
}

ErrorCode ExitStatus::error_code() const {
  for (const ErrorCode known : {ErrorCode::kUsage, ErrorCode::kConfig, ErrorCode::kModelFile,
                                ErrorCode::kDevice, ErrorCode::kPortInUse, ErrorCode::kExhausted}) {
    if (signal == 0 && exit_code(known) == code) return known;
  }
  return ErrorCode::kInternal;
}

std::string become(const std::vector<std::string>& words) {
  execvp(words.front().c_str(), pointers_to(words).data());
  return std::strerror(errno);
}

Process::Process(const Command& command) : name_(command.name) {
  FT_CHECK(!command.argv.empty());
  const std::vector<char*> argv = pointers_to(command.argv);
  const std::vector<std::string> environment = environment_for(command);
  const std::vector<char*> environment_pointers = pointers_to(environment);
  int output[2] = {-1, STDERR_FILENO};
  if (command.capture_output && pipe2(output, O_CLOEXEC) != 0) {
    throw Exception(ErrorCode::kIo, std::string("pipe failed: ") + std::strerror(errno));
  }
  output_fd_ = output[0];
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ == 0) run_child(command, argv.data(), environment_pointers.data(), parent, output[1]);
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
    kill(-pid_, SIGKILL);  // to all of its group
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

}  // namespace foretoken::launch
