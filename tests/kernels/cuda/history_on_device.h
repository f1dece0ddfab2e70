// The attention histories of some sequences on a device, and what tests read of them.
#pragma once

#include "kernels/cpu/history_rows.h"
#include "tests/kernels/cuda/cuda_test.h"

namespace foretoken::kernels {

struct HistoryShape {
  int num_layers = 1;
  int num_kv_heads = 1;
  int maps_per_kv_head = 1;
  int max_columns = 0;
  int top_k = 1;
  int max_per_head = 1;
  HistoryType type = HistoryType::kBf16;

  int num_maps() const { return num_kv_heads * maps_per_kv_head; }
  int pitch() const { return (max_columns + 7) / 8 * 8; }
};

// One sequence's history. Rows start as what a recycled allocation may hold.
class HistoryOnDevice {
 public:
  HistoryOnDevice(DeviceUnderTest& on, const HistoryShape& shape)
      : shape_(shape),
        rows_(on, std::vector<std::byte>(maps() * kRingRows * row_bytes(), std::byte{0xAB})),
        stream_(on, std::vector<std::byte>(maps() *
                                           on.device->predictor_state_bytes(shape.max_columns))),
        num_rows_(on, std::vector<std::int64_t>(layers())),
        num_columns_(on, std::vector<std::int32_t>(layers())),
        fallbacks_(on, std::vector<std::uint32_t>(1)) {}

  HistoryState state() const {
    return {.rows = rows_.data(),
            .stream = stream_.data(),
            .num_rows = num_rows_.data(),
            .num_columns = num_columns_.data(),
            .fallbacks = fallbacks_.data(),
            .num_layers = shape_.num_layers,
            .num_kv_heads = shape_.num_kv_heads,
            .maps_per_kv_head = shape_.maps_per_kv_head,
            .max_columns = shape_.max_columns,
            .pitch = shape_.pitch(),
            .top_k = shape_.top_k,
            .max_per_head = shape_.max_per_head,
            .type = static_cast<std::int32_t>(shape_.type)};
  }
  std::vector<std::int64_t> num_rows() const { return num_rows_.get(); }
  std::vector<std::int32_t> num_columns() const { return num_columns_.get(); }
  std::uint32_t fallbacks() const { return fallbacks_.get()[0]; }
  std::vector<std::byte> stream() const { return stream_.get(); }
  void forget_sums() { stream_.set(std::vector<std::byte>(stream_.get().size())); }
  const HistoryShape& shape() const { return shape_; }

  // All of the ring of a map, decoded: [kRingRows, pitch].
  std::vector<float> ring(int layer, int map) const {
    const std::vector<std::byte> bytes = rows_.get();
    const auto first = static_cast<std::size_t>(layer * shape_.num_maps() + map) * kRingRows;
    std::vector<float> out(static_cast<std::size_t>(kRingRows * shape_.pitch()));
    decode_history(shape_.type, bytes.data() + first * row_bytes(), 0, kRingRows * shape_.pitch(),
                   out.data());
    return out;
  }

 private:
  std::size_t layers() const { return static_cast<std::size_t>(shape_.num_layers); }
  std::size_t maps() const { return layers() * static_cast<std::size_t>(shape_.num_maps()); }
  std::size_t row_bytes() const {
    return static_cast<std::size_t>(shape_.pitch()) * bytes_of(shape_.type);
  }

  HistoryShape shape_;
  DeviceArray<std::byte> rows_;
  DeviceArray<std::byte> stream_;
  DeviceArray<std::int64_t> num_rows_;
  DeviceArray<std::int32_t> num_columns_;
  DeviceArray<std::uint32_t> fallbacks_;
};

}  // namespace foretoken::kernels
