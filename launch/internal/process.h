// Process: a child in a process group of its own, which the kernel kills when its parent dies.
//
// Not thread-safe. Start children from the main thread: the kernel takes the end of the thread that
// forked for the parent's death. Example: tests/launch/process_test.cc
#pragma once

#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/result.h"

namespace foretoken::launch {

struct Command {
  std::string name;               // in messages
  std::vector<std::string> argv;  // argv[0] is a path, or looked up in $PATH
  std::vector<std::pair<std::string, std::string>> environment = {};  // added to ours
  std::vector<std::string> unset = {};                                // taken from ours
  bool capture_output = false;  // its standard output is a pipe to us; see Process::output_fd()
  // What the kernel sends it when we die. SIGTERM only for a child that has something to end or to
  // remove, and is sure to do so.
  int parent_death_signal = 9;
};

// How a child ended: an exit code or a signal.
struct ExitStatus {
  int code = 0;
  int signal = 0;
  bool ok() const { return code == 0 && signal == 0; }
  std::string describe() const;  // "exited with code 3", "was ended by signal 9 (Killed)"
  // Of ours, the error that it exited over; kInternal where its code stands for several, or none.
  ErrorCode error_code() const;
};

// Becomes another program: words[0] is a path, or looked up in $PATH. Returns only where that can't
// be started: why.
std::string become(const std::vector<std::string>& words);

class Process {
 public:
  // Its standard input is empty; its standard output is our standard error unless captured.
  // Throws Exception(kIo).
  explicit Process(const Command& command);
  // Kills the group if it still runs, and waits for the child.
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  const std::string& name() const { return name_; }
  pid_t pid() const { return pid_; }
  int pidfd() const { return pidfd_; }          // readable once the child has ended
  int output_fd() const { return output_fd_; }  // non-blocking; -1 unless captured

  // nullopt while it runs.
  std::optional<ExitStatus> poll();
  // Waits; nullopt after `timeout`.
  std::optional<ExitStatus> wait(std::chrono::milliseconds timeout);
  void signal(int number);  // to the child

 private:
  std::string name_;
  pid_t pid_ = 0;
  int pidfd_ = -1;
  int output_fd_ = -1;
  std::optional<ExitStatus> ended_;
};

}  // namespace foretoken::launch
