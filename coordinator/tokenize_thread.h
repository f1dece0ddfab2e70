// TokenizeThread: turns long texts into tokens beside the main loop. Tenants take turns; a
// tenant's texts are in their order.
//
// Owns its thread. submit(), cancel(), waiting_bytes() and take() are for one thread; fd() is
// readable when take() has something. Example: tests/coordinator/tokenize_thread_test.cc
#pragma once

#include <condition_variable>
#include <list>
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

  void submit(RequestId id, const std::string& tenant, std::string text,
              EncodeOptions options) override;
  void cancel(RequestId id) override;
  WaitingBytes waiting_bytes(const std::string& tenant) override;
  std::vector<Answer> take();
  int fd() const { return event_fd_; }

 private:
  struct Job {
    RequestId id{};
    std::string tenant;
    std::string text;
    EncodeOptions options;
  };
  void end_turn(const std::string& tenant);
  void run();

  const Tokenizer tokenizer_;
  int event_fd_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Job> jobs_;          // guarded by mutex_; the next one is the first
  std::vector<Answer> answers_;  // guarded by mutex_
  bool stop_ = false;            // guarded by mutex_
  std::thread thread_;
};

}  // namespace foretoken::coordinator
