#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

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

// Views into pools of random values, one pool a scale: a model of any size is there at once. Where
// a tensor's view begins follows from its name. A pool repeats itself after a prime number of
// values, so no row of a matrix is another's copy.
class DummySource final : public WeightSource {
 public:
  explicit DummySource(const ModelConfig& config)
      : dtype_(config.dtype == ModelDtype::kF16 ? TensorDtype::kF16 : TensorDtype::kBf16) {}

  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    const bool is_norm = shape.size() == 1 && name.ends_with("norm.weight");
    const std::size_t offset = is_norm ? 0 : std::hash<std::string>{}(name) % kPeriod;
    const auto& pool = is_norm ? ones(count) : random(shape.back(), offset + count);
    return TensorView{dtype_,
                      {shape.begin(), shape.end()},
                      std::as_bytes(std::span(pool).subspan(offset, count))};
  }

 private:
  using Pool = std::vector<std::uint16_t>;
  static constexpr std::size_t kPeriod = 1'048'583;

  const Pool& ones(std::size_t count) const {
    if (ones_.size() < count) ones_.assign(count, encode(1.0F));
    return ones_;
  }

  // Variance 1 / columns keeps a product's scale.
  const Pool& random(std::int64_t columns, std::size_t count) const {
    Pool& pool = pools_[columns];
    if (pool.size() >= count) return pool;
    if (pool.empty()) first_period(pool, std::sqrt(3.0F / static_cast<float>(columns)));
    std::size_t filled = pool.size();
    Pool grown(std::max(count, kPeriod));
    std::copy(pool.begin(), pool.end(), grown.begin());
    for (; filled < grown.size(); ++filled) grown[filled] = grown[filled - kPeriod];
    old_pools_.push_back(std::move(pool));
    pool = std::move(grown);
    return pool;
  }

  void first_period(Pool& pool, float scale) const {
    pool.resize(kPeriod);
    std::uint64_t state = 1;
    for (std::uint16_t& value : pool) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      const auto uniform = static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31F;
      value = encode(uniform * scale);
    }
  }

  std::uint16_t encode(float value) const {
    if (dtype_ == TensorDtype::kF16) return half_from_float(value);
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
  }

  TensorDtype dtype_;
  mutable Pool ones_;
  mutable std::map<std::int64_t, Pool> pools_;  // by columns
  mutable std::vector<Pool> old_pools_;         // views of them may be in use
};

}  // namespace

std::unique_ptr<WeightSource> make_folder_source(ModelWeights weights) {
  return std::make_unique<FolderSource>(std::move(weights));
}

std::unique_ptr<WeightSource> make_dummy_source(const ModelConfig& config) {
  return std::make_unique<DummySource>(config);
}

}  // namespace foretoken::worker
