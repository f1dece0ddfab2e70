#include <array>
#include <bit>
#include <cmath>

#include "common/half.h"
#include "worker/model.h"

namespace foretoken::worker {
namespace {

class FolderSource final : public WeightSource {
 public:
  explicit FolderSource(ModelWeights weights) : weights_(std::move(weights)) {}
  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    return weights_.tensor(name, shape);
  }

 private:
  ModelWeights weights_;
};

// Made anew at each call, from a seed that is the tensor's name. A view lives until the next call,
// so matrices of several parts (q, k and v) need a buffer each: the last kBuffers are kept.
class DummySource final : public WeightSource {
 public:
  explicit DummySource(const ModelConfig& config)
      : dtype_(config.dtype == ModelDtype::kF16 ? TensorDtype::kF16 : TensorDtype::kBf16) {}

  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    const bool is_norm = shape.size() == 1 && name.ends_with("norm.weight");
    std::vector<std::uint16_t>& values = buffers_[next_++ % kBuffers];
    values.resize(count);
    // Variance 1 / columns keeps a product's scale.
    const float scale = std::sqrt(3.0F / static_cast<float>(shape.back()));
    std::uint64_t state = std::hash<std::string>{}(name) | 1;
    for (std::uint16_t& value : values) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      const auto uniform = static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31F;
      value = encode(is_norm ? 1.0F : uniform * scale);
    }
    return TensorView{dtype_,
                      {shape.begin(), shape.end()},
                      std::as_bytes(std::span<const std::uint16_t>(values))};
  }

 private:
  std::uint16_t encode(float value) const {
    if (dtype_ == TensorDtype::kF16) return half_from_float(value);
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
  }

  TensorDtype dtype_;
  static constexpr std::size_t kBuffers = 3;
  mutable std::array<std::vector<std::uint16_t>, kBuffers> buffers_;
  mutable std::size_t next_ = 0;
};

}  // namespace

std::unique_ptr<WeightSource> make_folder_source(ModelWeights weights) {
  return std::make_unique<FolderSource>(std::move(weights));
}

std::unique_ptr<WeightSource> make_dummy_source(const ModelConfig& config) {
  return std::make_unique<DummySource>(config);
}

}  // namespace foretoken::worker
