// Uploader: brings host memory that isn't pinned (a mapped file, whose pages are read here) to the
// device at the speed of the link: several threads copy to pinned buffers, two a thread, which the
// copy engine empties meanwhile.
//
// For one caller at a time. Example: tests/kernels/cuda/upload_test.cc
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "kernels/cpu/thread_pool.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

class Uploader {
 public:
  explicit Uploader(int device_index);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // As Device::upload.
  void upload(void* device, const HostRows& rows);

 private:
  class Lane;  // what a thread copies through
  void upload_long_rows(std::byte* device, const HostRows& rows);

  int device_index_;
  std::vector<std::unique_ptr<Lane>> lanes_;  // of the pool's threads
  ThreadPool pool_;
};

}  // namespace foretoken::kernels::cuda
