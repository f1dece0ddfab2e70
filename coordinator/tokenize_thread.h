// TokenizeThread: turns long texts into tokens beside the main loop, first come first served.
//
// Owns its thread. submit() and take() are for one thread; fd() is readable when take() has
// something.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/ids.h"
#include "common/tokenizer.h"

namespace foretoken::coordinator {

class TokenizeThread {
 public:
  struct Answer {
    RequestId id{};
    Result<std::vector<TokenId>> ids;
  };
  explicit TokenizeThread(Tokenizer tokenizer);
  ~TokenizeThread();

  void submit(RequestId id, std::string text, EncodeOptions options);
  std::vector<Answer> take();
  int fd() const { return event_fd_; }

 private:
  struct Job {
    RequestId id{};
    std::string text;
    EncodeOptions options;
  };
  void run();

  const Tokenizer tokenizer_;
  int event_fd_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;         // guarded by mutex_
  std::vector<Answer> answers_;  // guarded by mutex_
  bool stop_ = false;            // guarded by mutex_
  std::thread thread_;
};

}  // namespace foretoken::coordinator
