// upload(): a host's array in device memory of its own. Waits for the copy.
#pragma once

#include <vector>

#include "kernels/device.h"

namespace foretoken::worker {

template <typename T>
kernels::DeviceBuffer upload(kernels::Device& device, kernels::Stream& stream,
                             const std::vector<T>& values, kernels::MemoryUse use) {
  kernels::DeviceBuffer buffer(device, values.size() * sizeof(T), use);
  device.copy_in(buffer.data(), values.data(), buffer.bytes(), stream);
  stream.synchronize();
  return buffer;
}

}  // namespace foretoken::worker
