// What the tests of device ops share: a device with a stream, and tensors that live on it.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "kernels/device.h"

namespace foretoken::kernels {

struct TestDevice {
  explicit TestDevice(int num_threads = 2)
      : device(make_cpu_device({num_threads, std::size_t{1} << 30})),
        stream(device->make_stream(StreamKind::kCompute)) {}

  // Calls an op and waits: run(&Device::linear, args).
  template <typename Args>
  void run(void (Device::*op)(const Args&, Stream&), const Args& args) {
    (device.get()->*op)(args, *stream);
    stream->synchronize();
  }

  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
};

inline std::vector<float> random_floats(std::size_t count, std::uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace foretoken::kernels
