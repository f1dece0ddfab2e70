// TokenizeThread: turns long texts into tokens beside the main loop, first come first served.
//
// Owns its thread. submit(), cancel() and take() are for one thread; fd() is readable when take()
// has something. Example: tests/coordinator/tokenize_thread_test.cc
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "coordinator/tokenize_later.h"

namespace foretoken::coordinator {

class TokenizeThread : public TokenizeLater {
 public:
  struct Answer {
    RequestId id{};
    Result<std::vector<TokenId>> ids;
  };
  explicit TokenizeThread(Tokenizer tokenizer);
  ~TokenizeThread() override;

  void submit(RequestId id, std::string text, EncodeOptions options) override;
  void cancel(RequestId id) override;
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
