#include "kernels/device.h"

#include <utility>

#include "common/check.h"

namespace foretoken::kernels {

std::string_view name_of(DataType type) {
  switch (type) {
    case DataType::kFp32:
      return "float32";
    case DataType::kFp16:
      return "float16";
    case DataType::kBf16:
      return "bfloat16";
  }
  FT_CHECK(false, static_cast<int>(type));
}

std::string_view name_of(MemoryUse use) {
  switch (use) {
    case MemoryUse::kWeights:
      return "weights";
    case MemoryUse::kKvSlots:
      return "KV slots";
    case MemoryUse::kTables:
      return "tables";
    case MemoryUse::kHistory:
      return "attention history";
    case MemoryUse::kSketches:
      return "key sketches";
    case MemoryUse::kActivations:
      return "activations";
    case MemoryUse::kPrefill:
      return "prefill scratch";
    case MemoryUse::kSums:
      return "sums over ranks";
    case MemoryUse::kCount:
      break;
  }
  FT_CHECK(false, static_cast<int>(use));
}

void Device::linear_chain(const LinearChainArgs& args, Stream& /*stream*/) {
  FT_CHECK(chains(args), args.products.size());
}

DeviceBuffer::DeviceBuffer(Device& device, std::size_t bytes, MemoryUse use)
    : device_(&device), data_(device.allocate(bytes, use)), bytes_(bytes), use_(use) {}

DeviceBuffer::~DeviceBuffer() {
  if (device_ != nullptr) device_->release(data_, bytes_, use_);
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      use_(other.use_) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(use_, other.use_);
  return *this;
}

}  // namespace foretoken::kernels
