// What the tests of CUDA ops share: the CPU device (the reference) and the CUDA device beside it,
// and arrays that live on either. A test without a GPU skips, and says so.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/device.h"
#include "tests/kernels/reference.h"

namespace foretoken::kernels {

// A device with a stream, and calls that wait.
struct DeviceUnderTest {
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;

  explicit DeviceUnderTest(std::unique_ptr<Device> made)
      : device(std::move(made)), stream(device->make_stream(StreamKind::kCompute)) {}

  // run(&Device::linear, args).
  template <typename Args>
  void run(void (Device::*op)(const Args&, Stream&), const Args& args) {
    (device.get()->*op)(args, *stream);
    stream->synchronize();
  }
};

// An array on a device: made of host values, and read back.
template <typename T>
class DeviceArray {
 public:
  DeviceArray(DeviceUnderTest& on, const std::vector<T>& values)
      : on_(on),
        count_(values.size()),
        buffer_(*on.device, std::max<std::size_t>(1, values.size()) * sizeof(T),
                MemoryUse::kActivations) {
    set(values);
  }
  void set(const std::vector<T>& values) const {
    on_.device->copy_in(buffer_.data(), values.data(), values.size() * sizeof(T), *on_.stream);
    on_.stream->synchronize();
  }
  std::vector<T> get() const {
    std::vector<T> values(count_);
    on_.device->copy_out(values.data(), buffer_.data(), count_ * sizeof(T), *on_.stream);
    on_.stream->synchronize();
    return values;
  }
  T* data() const { return buffer_.as<T>(); }

 private:
  DeviceUnderTest& on_;
  std::size_t count_;
  DeviceBuffer buffer_;
};

// Floats as the device's activations are stored (fp32 on the CPU), and back.
inline DeviceArray<std::byte> activations(DeviceUnderTest& on, const std::vector<float>& values) {
  return {on, reference::encode(values, on.device->activation_type())};
}
inline std::vector<float> floats_of(const DeviceArray<std::byte>& array, DataType type) {
  const std::vector<std::byte> bytes = array.get();
  std::vector<float> values(bytes.size() / bytes_of(type));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(reference::decode_at(bytes.data(), type, i));
  }
  return values;
}
// The nearest values that `type` can hold: what both devices are given.
inline std::vector<float> rounded(std::vector<float> values, DataType type) {
  const std::vector<std::byte> bytes = reference::encode(values, type);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(reference::decode_at(bytes.data(), type, i));
  }
  return values;
}

class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (num_cuda_devices() == 0) GTEST_SKIP() << "no CUDA device";
  }
  // Both devices; the CUDA one with activations of `type`.
  struct Pair {
    explicit Pair(DataType type = DataType::kBf16)
        : cpu(make_cpu_device({.num_threads = 4, .memory_bytes = std::size_t{16} << 30})),
          cuda(make_cuda_device({.activation_type = type})) {}
    DeviceUnderTest cpu;
    DeviceUnderTest cuda;
  };
};

}  // namespace foretoken::kernels
