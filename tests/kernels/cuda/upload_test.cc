// upload on the GPU: rows of any length and stride, in one chunk and in many.
#include <cstring>

#include "tests/kernels/cuda/cuda_test.h"
#include "tests/kernels/test_device.h"

namespace foretoken::kernels {
namespace {

struct Shape {
  std::size_t count;
  std::size_t row_bytes;
  std::size_t stride_bytes;
};

class CudaUpload : public CudaTest, public testing::WithParamInterface<Shape> {};

TEST_P(CudaUpload, BringsEveryByte) {
  const Shape shape = GetParam();
  std::vector<std::byte> host(shape.count * shape.stride_bytes);
  for (std::size_t i = 0; i < host.size(); ++i) host[i] = static_cast<std::byte>(i % 251);
  const auto device = make_cuda_device({});
  const auto stream = device->make_stream(StreamKind::kCompute);
  const DeviceBuffer rows(*device, shape.count * shape.row_bytes, MemoryUse::kWeights);
  device->upload(rows.data(), {host.data(), shape.count, shape.row_bytes, shape.stride_bytes});
  device->finish_uploads();
  std::vector<std::byte> back(rows.bytes());
  device->copy_out(back.data(), rows.data(), back.size(), *stream);
  stream->synchronize();
  for (std::size_t row = 0; row < shape.count; ++row) {
    ASSERT_EQ(std::memcmp(back.data() + row * shape.row_bytes,
                          host.data() + row * shape.stride_bytes, shape.row_bytes),
              0)
        << "row " << row;
  }
}

// One matrix after the other, more than may wait at once.
TEST_F(CudaTest, UploadsFollowEachOther) {
  constexpr std::size_t kBytes = std::size_t{3} << 20;
  constexpr std::size_t kMatrices = 100;
  const auto device = make_cuda_device({});
  const auto stream = device->make_stream(StreamKind::kCompute);
  std::vector<std::byte> host(kBytes + kMatrices);
  for (std::size_t i = 0; i < host.size(); ++i) host[i] = static_cast<std::byte>(i % 251);
  std::vector<DeviceBuffer> matrices;
  for (std::size_t i = 0; i < kMatrices; ++i) {
    matrices.emplace_back(*device, kBytes, MemoryUse::kWeights);
    device->upload(matrices[i].data(), {host.data() + i, 1, kBytes, kBytes});
  }
  device->finish_uploads();
  std::vector<std::byte> back(kBytes);
  for (std::size_t i = 0; i < kMatrices; ++i) {
    device->copy_out(back.data(), matrices[i].data(), kBytes, *stream);
    stream->synchronize();
    ASSERT_EQ(std::memcmp(back.data(), host.data() + i, kBytes), 0) << "matrix " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaUpload,
                         testing::Values(Shape{0, 8, 8}, Shape{1, 2, 2}, Shape{3, 7, 10},
                                         Shape{999, 8192, 8192}, Shape{5000, 8192, 28672},
                                         Shape{2, (std::size_t{9} << 20) + 5,
                                               (std::size_t{9} << 20) + 8},
                                         Shape{1, std::size_t{300} << 20, std::size_t{300} << 20}));

}  // namespace
}  // namespace foretoken::kernels
