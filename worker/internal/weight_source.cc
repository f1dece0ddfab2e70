#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <map>
#include <memory>
#include <thread>

#include "common/half.h"
#include "worker/model.h"

namespace foretoken::worker {
namespace {

class FileSource final : public WeightSource {
 public:
  FileSource(ModelWeights weights, std::string_view name)
      : weights_(std::move(weights)), name_(name) {}
  std::string_view name() const override { return name_; }
  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    return weights_.tensor(name, shape);
  }

 private:
  ModelWeights weights_;
  std::string_view name_;
};

// Values that repeat after a prime number of them, so that no row of a matrix is another's copy.
class Pool {
 public:
  static constexpr std::size_t kPeriod = 1'048'583;

  Pool() = default;
  // period: kPeriod values; the pool has `size`, filled by several threads.
  Pool(const std::vector<std::uint16_t>& period, std::size_t size)
      : size_(size), values_(std::make_unique_for_overwrite<std::uint16_t[]>(size)) {
    std::atomic<std::size_t> next{0};
    std::vector<std::jthread> threads;
    const unsigned count = std::clamp(std::thread::hardware_concurrency(), 1U, kMaxThreads);
    for (unsigned i = 0; i < count; ++i) {
      threads.emplace_back([&] {
        for (std::size_t at = 0; (at = next.fetch_add(kPeriod)) < size_;) {
          std::copy_n(period.data(), std::min(kPeriod, size_ - at), values_.get() + at);
        }
      });
    }
  }

  std::size_t size() const { return size_; }
  std::span<const std::uint16_t> view(std::size_t offset, std::size_t count) const {
    return {values_.get() + offset, count};
  }

 private:
  static constexpr unsigned kMaxThreads = 8;
  std::size_t size_ = 0;
  std::unique_ptr<std::uint16_t[]> values_;
};

// Views into pools of random values, one pool a scale: a model of any size is there at once. Where
// a tensor's view begins follows from its name.
class DummySource final : public WeightSource {
 public:
  explicit DummySource(const ModelConfig& config)
      : dtype_(config.dtype == ModelDtype::kF16 ? TensorDtype::kF16 : TensorDtype::kBf16) {}

  std::string_view name() const override { return "random values"; }
  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    const bool is_norm = shape.size() == 1 && name.ends_with("norm.weight");
    const std::size_t offset = is_norm ? 0 : std::hash<std::string>{}(name) % Pool::kPeriod;
    const std::span<const std::uint16_t> values =
        is_norm ? ones(count) : random(shape.back(), count).view(offset, count);
    return TensorView{dtype_, {shape.begin(), shape.end()}, std::as_bytes(values)};
  }

 private:
  std::span<const std::uint16_t> ones(std::size_t count) const {
    std::vector<std::uint16_t>& ones = ones_[count];
    if (ones.empty()) ones.assign(count, encode(1.0F));
    return ones;
  }

  // With room for `count` values from any offset. Variance 1 / columns keeps a product's scale.
  const Pool& random(std::int64_t columns, std::size_t count) const {
    Pool& pool = pools_[columns];
    const std::size_t size = count + Pool::kPeriod;
    if (pool.size() >= size) return pool;
    if (pool.size() > 0) old_pools_.push_back(std::move(pool));
    pool = Pool(one_period(std::sqrt(3.0F / static_cast<float>(columns))), size);
    return pool;
  }

  std::vector<std::uint16_t> one_period(float scale) const {
    std::vector<std::uint16_t> values(Pool::kPeriod);
    std::uint64_t state = 1;
    for (std::uint16_t& value : values) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      const auto uniform = static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31F;
      value = encode(uniform * scale);
    }
    return values;
  }

  std::uint16_t encode(float value) const {
    if (dtype_ == TensorDtype::kF16) return half_from_float(value);
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
  }

  TensorDtype dtype_;
  mutable std::map<std::size_t, std::vector<std::uint16_t>> ones_;  // by their count
  mutable std::map<std::int64_t, Pool> pools_;                      // by columns
  mutable std::vector<Pool> old_pools_;                             // views of them may be in use
};

}  // namespace

std::unique_ptr<WeightSource> make_file_source(ModelWeights weights, std::string_view name) {
  return std::make_unique<FileSource>(std::move(weights), name);
}

std::unique_ptr<WeightSource> make_dummy_source(const ModelConfig& config) {
  return std::make_unique<DummySource>(config);
}

}  // namespace foretoken::worker
