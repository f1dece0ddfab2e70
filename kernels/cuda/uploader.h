// Uploader: brings host memory that isn't pinned (a mapped file, whose pages are read here) to the
// device at the speed of the link: several threads copy to pinned buffers, two a thread, which the
// copy engine empties meanwhile. Matrices follow each other without a pause.
//
// For one caller at a time. Example: tests/kernels/cuda/upload_test.cc
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/device.h"

namespace foretoken::kernels::cuda {

class Uploader {
 public:
  explicit Uploader(int device_index);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // As Device::upload and finish_uploads. upload() waits while much is under way, so that what it
  // was called for tells how far the whole is.
  void upload(void* device, const HostRows& rows);
  void finish();  // throws what the first that failed met, and so does every later call

 private:
  class Lane;  // what a thread copies through
  struct Chunk {
    std::byte* device = nullptr;
    HostRows rows;
  };
  void upload_long_rows(std::byte* device, const HostRows& rows);
  void push(const Chunk& chunk);
  void run(std::unique_ptr<Lane>& lane, const std::stop_token& stop);

  int device_index_;
  std::vector<std::unique_ptr<Lane>>
      lanes_;  // each its thread's; the caller's while none has chunks
  std::mutex mutex_;
  std::condition_variable_any work_;  // a thread waits for a chunk
  std::condition_variable progress_;  // the caller, for the threads
  std::deque<Chunk> waiting_;         // guarded by mutex_, as what follows
  std::size_t num_begun_ = 0;         // chunks that a thread has
  std::exception_ptr failure_;        // the first one; what follows it is dropped
  std::vector<std::jthread> threads_;
};

}  // namespace foretoken::kernels::cuda
