// PinnedArray: host memory that the device copies to and from while the host goes on.
#pragma once

#include <cstddef>
#include <span>
#include <utility>

#include "kernels/device.h"

namespace foretoken::worker {

template <typename T>
class PinnedArray {
 public:
  PinnedArray(kernels::Device& device, std::size_t count)
      : device_(device),
        data_(static_cast<T*>(device.allocate_pinned(count * sizeof(T)))),
        count_(count) {}
  ~PinnedArray() { device_.release_pinned(data_); }
  PinnedArray(const PinnedArray&) = delete;
  PinnedArray& operator=(const PinnedArray&) = delete;

  T* data() const { return data_; }
  std::span<T> first(std::size_t count) const { return {data_, count}; }
  std::size_t size() const { return count_; }

 private:
  kernels::Device& device_;
  T* data_;
  std::size_t count_;
};

}  // namespace foretoken::worker
