// Weights through the store's copy are those that were handed over; without one, loading goes on.
#include "worker/weight_keeper.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>

#include "tests/worker/local_group.h"
#include "tests/worker/small_model.h"

namespace foretoken::worker {
namespace {

constexpr std::int64_t kArenaBytes = 64 << 20;

using Tensors = std::map<std::string, std::vector<std::byte>>;

void read(const WeightSource& source, Tensors& tensors, const std::string& name,
          std::span<const std::int64_t> shape) {
  const TensorView view = source.tensor(name, shape).value_or_throw();
  EXPECT_TRUE(std::ranges::equal(view.shape, shape));
  tensors[name].assign(view.bytes.begin(), view.bytes.end());
}

// A few of a model's, some twice, as tied embeddings are.
Tensors read_some(const WeightSource& source) {
  Tensors tensors;
  for (int i = 0; i < 2; ++i) read(source, tensors, "embed", std::array<std::int64_t, 2>{512, 128});
  read(source, tensors, "layers.0.norm.weight", std::array<std::int64_t, 1>{128});
  read(source, tensors, "layers.0.q.weight", std::array<std::int64_t, 2>{384, 128});
  read(source, tensors, "layers.0.small_norm.weight", std::array<std::int64_t, 1>{3});
  read(source, tensors, "layers.0.bias", std::array<std::int64_t, 1>{7});
  return tensors;
}

std::unique_ptr<WeightSource> open_dummy() { return make_dummy_source(small_model()); }
std::unique_ptr<WeightSource> open_nothing() {
  ADD_FAILURE() << "the copy was not used";
  return open_dummy();
}

TEST(WeightKeeper, TheNextStartLoadsFromTheStore) {
  const StoreProcess store(kArenaBytes);
  WeightKeeper first(store.socket(), "model", open_dummy);
  EXPECT_EQ(first.source().name(), "random values");
  const Tensors tensors = read_some(first.source());
  first.keep().join();

  WeightKeeper second(store.socket(), "model", open_nothing);
  EXPECT_EQ(second.source().name(), "the store");
  EXPECT_EQ(read_some(second.source()), tensors);
  EXPECT_FALSE(second.source().tensor("layers.0.q.weight", std::array<std::int64_t, 2>{1, 2}))
      << "shapes are checked as a file's are";
  second.keep().join();  // nothing to do
  EXPECT_EQ(WeightKeeper(store.socket(), "model", open_nothing).source().name(), "the store");
}

TEST(WeightKeeper, OfTwoThatLoadAtOnceOneIsKept) {
  const StoreProcess store(kArenaBytes);
  WeightKeeper one(store.socket(), "model", open_dummy);
  WeightKeeper other(store.socket(), "model", open_dummy);
  const Tensors tensors = read_some(one.source());
  EXPECT_EQ(read_some(other.source()), tensors);
  std::jthread first = one.keep();
  other.keep().join();
  first.join();
  const WeightKeeper next(store.socket(), "model", open_nothing);
  EXPECT_EQ(read_some(next.source()), tensors);
}

TEST(WeightKeeper, AnotherModelLoadsFromWhereItLies) {
  const StoreProcess store(kArenaBytes);
  WeightKeeper first(store.socket(), "model", open_dummy);
  read_some(first.source());
  first.keep().join();
  WeightKeeper other(store.socket(), "other", open_dummy);
  EXPECT_EQ(other.source().name(), "random values");
  read_some(other.source());
  other.keep().join();
  EXPECT_EQ(WeightKeeper(store.socket(), "model", open_nothing).source().name(), "the store");
}

TEST(WeightKeeper, WithoutAStoreLoadingGoesOn) {
  WeightKeeper keeper("/nonexistent/store", "model", open_dummy);
  EXPECT_EQ(keeper.source().name(), "random values");
  keeper.keep().join();
}

}  // namespace
}  // namespace foretoken::worker
