#include "coordinator/tokenize_thread.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/check.h"

namespace foretoken::coordinator {

TokenizeThread::TokenizeThread(Tokenizer tokenizer)
    : tokenizer_(std::move(tokenizer)), event_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  FT_CHECK(event_fd_ >= 0);
  thread_ = std::thread([this] { run(); });
}

TokenizeThread::~TokenizeThread() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
  close(event_fd_);
}

void TokenizeThread::submit(RequestId id, const std::string& tenant, std::string text,
                            EncodeOptions options) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back({id, tenant, std::move(text), options});
  }
  wake_.notify_one();
}

void TokenizeThread::cancel(RequestId id) {
  const std::lock_guard lock(mutex_);
  std::erase_if(jobs_, [id](const Job& job) { return job.id == id; });
}

TokenizeLater::WaitingBytes TokenizeThread::waiting_bytes(const std::string& tenant) {
  const std::lock_guard lock(mutex_);
  WaitingBytes bytes;
  for (const Job& job : jobs_) {
    bytes.all += job.text.size();
    if (job.tenant == tenant) bytes.of_tenant += job.text.size();
  }
  return bytes;
}

std::vector<TokenizeThread::Answer> TokenizeThread::take() {
  const std::lock_guard lock(mutex_);  // also for what fd() says: it goes with the answers
  eventfd_t count = 0;
  eventfd_read(event_fd_, &count);
  return std::exchange(answers_, {});
}

// Its texts go behind those of all others.
void TokenizeThread::end_turn(const std::string& tenant) {
  std::list<Job> rest;
  for (auto job = jobs_.begin(); job != jobs_.end();) {
    const auto next = std::next(job);
    if (job->tenant == tenant) rest.splice(rest.end(), jobs_, job);
    job = next;
  }
  jobs_.splice(jobs_.end(), rest);
}

void TokenizeThread::run() {
  pthread_setname_np(pthread_self(), "tokenize");
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    const Job job = std::move(jobs_.front());
    jobs_.pop_front();
    end_turn(job.tenant);
    lock.unlock();
    auto ids = tokenizer_.encode(job.text, job.options);
    lock.lock();
    answers_.push_back({job.id, std::move(ids)});
    eventfd_write(event_fd_, 1);
  }
}

}  // namespace foretoken::coordinator
